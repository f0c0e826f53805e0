"""What a command leaves behind: recorded, resumed, read, shown as a page."""
