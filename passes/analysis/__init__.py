"""What is true of a graph: costs, lifetimes, timelines, repetition. Nothing here changes a graph."""
