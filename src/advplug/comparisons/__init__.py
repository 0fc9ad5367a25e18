"""Two stored runs side by side, and the gates of continuous integration that follow."""
