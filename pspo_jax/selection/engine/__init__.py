"""What all selectors share: visits, eligibility, quotas, exploration, and a draw that passes over few prompts."""
