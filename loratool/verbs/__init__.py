"""What can be asked: one public function a module, with its report."""
