"""Students whose weight matrices hold -1, 0 and 1 times a scale: trained with them in the loop, kept in two bits."""
