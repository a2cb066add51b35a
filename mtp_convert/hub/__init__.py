"""The Hugging Face Hub: names, reading by byte ranges, downloads, uploads."""
