"""What a route is judged by: costs, places, precision, peers to avoid; and why it was chosen."""
