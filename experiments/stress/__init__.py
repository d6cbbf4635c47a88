"""What breaks: pulled plugs, full disks, rubbish as input, load."""
