"""What a cleaning run is judged by."""
