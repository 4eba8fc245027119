"""One file per stage of the journey, the recipe that types their settings, and the command line."""
