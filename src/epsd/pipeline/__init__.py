"""What a stage and a trial of the search share: parameters and prepared data in, objects out. No file is written."""
