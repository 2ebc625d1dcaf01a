"""Problems that are generated: arithmetic, countdown, the text suite, and those of reasoning-gym."""
