"""Where a step's time and memory go: profiles, and the page that shows them."""
