"""What tests of several folders share: builders of inputs, runs of the command line, oracles."""
