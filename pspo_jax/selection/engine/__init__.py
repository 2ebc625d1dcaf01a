"""What all selectors have in common: visits, eligibility, quotas, exploration, and a fast draw."""
