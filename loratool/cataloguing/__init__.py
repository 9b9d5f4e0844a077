"""What lies in a folder or belongs to somebody on the Hub: adapters and models, a line for each."""
