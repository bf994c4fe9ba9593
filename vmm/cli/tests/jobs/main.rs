//! The queue as its users see it: real coordinators, workers and machines.

mod coordinator;
mod pool;
