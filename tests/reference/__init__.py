"""What the packages are compared with: sequential code from the mathematics, torch only."""
