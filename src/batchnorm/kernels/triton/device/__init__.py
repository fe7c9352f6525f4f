"""What runs on the device: in Triton's language, imported when the first call comes."""
