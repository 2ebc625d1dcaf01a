"""What all selectors share: visits, eligibility, quotas, exploration, and a draw that does not pass over all prompts."""
