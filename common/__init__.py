"""What all wings share: flags and errors, files, random numbers, processes, drawing."""
