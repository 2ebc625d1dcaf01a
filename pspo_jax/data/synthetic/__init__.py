"""Problems that are generated: arithmetic, countdown, and those of reasoning-gym."""
