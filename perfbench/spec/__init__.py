"""What a scenario may say, the cases that it asks for, and what a backbone's name means. Free of torch."""
