"""Reading from a Hugging Face hub: what is there, the bytes of it, and what to do while it does not answer."""
