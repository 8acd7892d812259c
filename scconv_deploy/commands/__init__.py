"""The commands, one file for what they take: each parses, calls, prints, and exits. No logic lives here."""
