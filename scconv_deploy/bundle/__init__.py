"""What travels: atomic writes and the manifest. Standard library only, for it also runs on the device."""
