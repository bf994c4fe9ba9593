//! The `harrier` program as a user runs it: bad input, plain boots of tiny guests, commands in real guests.

mod attempt;
mod bad_hosts;
mod bad_input;
mod files;
mod fork;
mod guest_asks;
mod guest_kernel;
mod hypercalls;
mod limits;
mod machines;
mod machines_survive;
mod plain_boot;
mod run_command;
mod selftest;
mod snapshots;
mod snapshots_survive;
mod support;
