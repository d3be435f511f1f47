"""Devices, processes and their memory."""
