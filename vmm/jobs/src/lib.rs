//! The host's side of jobs, in four parts that know only those before them:
//!
//! - [`session`] runs commands in one machine through the machine's agent, [`files`] copies files over it;
//! - [`queue`] is what a job is: its specification, states, reasons, and the language of requirements;
//! - [`store`] keeps jobs: one trait, and a SQLite file behind it;
//! - [`worker`] takes jobs from a store and runs each in a monitor process of its own.
//!
//! A [`session::Session`] runs several commands, each a [`CommandSpec`] with the endpoints of its streams ([`Stdio`]), a
//! [`Controller`] and an [`Outcome`], over whichever connection the agent has opened last. [`execute`] runs a single
//! one and ends the machine. The guest is not trusted: it cannot make the host keep more than the streams'
//! windows, and its texts are made printable.
//!
//! Neighbours: `harrier-agent-protocol` below, the agent on the other end, the command line above. How a machine is
//! started and how its connection comes about is not known here.

mod control;
mod executor;
pub mod files;
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
    AGENT_PORT, Cause, CommandSpec, Limits, ROOT_DISK_SERIAL, Root, SpecError, Usage, User, WindowSize,
};
pub use outcome::{ExecuteError, Outcome, Status, Timings};
pub use session::{Command, Session, SessionOptions, SessionState};
pub use stdio::{FdOutput, Output, Stdin, Stdio};
