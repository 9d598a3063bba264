"""Where images come from: one decoder, content that names itself, splits that follow it, and one file a format."""
