//! Bundle to plan.
