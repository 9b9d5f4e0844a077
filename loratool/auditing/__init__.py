"""An adapter looked through for what does nothing, takes too much room, or stands out."""
