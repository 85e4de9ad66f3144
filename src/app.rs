//! Builds the house, drains it, exits.
