//! The host's side of jobs, in four parts that know only those before them:
//!
//! - the executor runs commands in one machine through the machine's agent;
//! - [`queue`] is what a job is: its specification, states, reasons, and the language of requirements;
//! - [`store`] keeps jobs: one trait, and a SQLite file behind it;
//! - [`worker`] takes jobs from a store and runs each in a monitor process of its own.
//!
//! [`execute`] takes the connection that the agent has opened, a [`CommandSpec`], the endpoints of the command's
//! streams ([`Stdio`]) and a [`ControlReceiver`], and gives the command's [`Outcome`]. What the agent may say and when is
//! [`session`]'s, without any I/O; threads, files and the connection are the executor's. The guest is not
//! trusted: it cannot make the host keep more than the streams' windows, and its texts are made printable.
//!
//! Neighbours: `harrier-agent-protocol` below, the agent on the other end, the command line above. How a machine is
//! started and how its connection comes about is not known here.

mod control;
mod executor;
mod outcome;
pub mod queue;
pub mod session;
mod stdio;
pub mod store;
pub mod units;
pub mod worker;

pub use control::{ControlReceiver, Controller, control};
pub use executor::{Options, execute};
pub use harrier_agent_protocol as protocol;
pub use harrier_agent_protocol::{
    AGENT_PORT, CommandSpec, ROOT_DISK_SERIAL, Root, SpecError, Usage, User, WindowSize,
};
pub use outcome::{ExecuteError, Outcome, Status, Timings};
pub use stdio::{FdOutput, Output, Stdin, Stdio};
