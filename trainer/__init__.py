"""Traces in, better drafter and policy out."""
