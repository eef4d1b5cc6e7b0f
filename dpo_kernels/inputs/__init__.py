"""What a call is given, checked and settled once at the door."""
