//! The queue as its users see it: real coordinators, workers and machines.

mod checkpoints;
mod coordinator;
mod files;
mod network;
mod owner;
mod pool;
mod reuse;
mod survive;
mod warm;
