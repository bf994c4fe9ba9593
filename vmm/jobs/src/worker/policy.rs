//! What a host's owner allows: five expressions over what the machine is doing.
//!
//! | key | when it is true |
//! |---|---|
//! | `start` | jobs are taken |
//! | `suspend` | running jobs stand still, at once |
//! | `continue` | suspended jobs go on |
//! | `evict` | suspended jobs are given back |
//! | `kill` | what still writes its state while it is given back is ended without it |

use serde::Deserialize;
use thiserror::Error;
use toml::Spanned;

use crate::queue::expr::{Expr, Scope, Value};

/// The names that the expressions may use.
pub const NAMES: &[&str] = &[
    "load",
    "idle",
    "hour",
    "weekday",
    "battery",
    "on_battery",
    "memory_free",
    "cpus",
    "busy",
    "running",
    "suspended_for",
    "evicting_for",
];

/// Follows the owner's flag and nothing else: for hosts that belong to the queue.
const DEDICATED: [&str; 5] = ["!busy", "busy", "!busy", "suspended_for > 10m", "evicting_for > 2m"];
/// Stays out of the way of somebody who works at the machine.
const DESKTOP: [&str; 5] = [
    "!busy && idle > 5m && load < 0.5 * cpus && !(on_battery && battery < 90%) && memory_free > 1G",
    "busy || idle < 30s || load > 0.8 * cpus || (on_battery && battery < 50%)",
    "!busy && idle > 2m && load < 0.5 * cpus && !(on_battery && battery < 50%)",
    "suspended_for > 10m || memory_free < 512M",
    "evicting_for > 2m",
];

/// A mistake in a policy file.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("line {line}: {message}")]
pub struct PolicyError {
    /// From 1.
    pub line: usize,
    /// What is wrong and what to do.
    pub message: String,
}

/// The owner's rules.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Take jobs.
    pub start: Expr,
    /// Let jobs stand still.
    pub suspend: Expr,
    /// Let them go on.
    pub resume: Expr,
    /// Give them back.
    pub evict: Expr,
    /// Give them back without their state.
    pub kill: Expr,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    /// What the keys that are not given are taken from.
    base: Option<Spanned<String>>,
    start: Option<Spanned<String>>,
    suspend: Option<Spanned<String>>,
    #[serde(rename = "continue")]
    resume: Option<Spanned<String>>,
    evict: Option<Spanned<String>>,
    kill: Option<Spanned<String>>,
}

impl Default for Policy {
    fn default() -> Self {
        Self::built_in(&DEDICATED)
    }
}

impl Policy {
    /// A policy that comes with the program: `dedicated` or `desktop`.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "dedicated" => Some(Self::built_in(&DEDICATED)),
            "desktop" => Some(Self::built_in(&DESKTOP)),
            _ => None,
        }
    }

    fn built_in(texts: &[&str; 5]) -> Self {
        let [start, suspend, resume, evict, kill] =
            texts.map(|text| Expr::parse_with(text, NAMES).unwrap_or_else(|_| Expr::never()));
        Self { start, suspend, resume, evict, kill }
    }

    /// Reads a policy file.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let line = |at: usize| {
            text.as_bytes().get(..at).unwrap_or_default().iter().filter(|byte| **byte == b'\n').count() + 1
        };
        let file: PolicyFile = toml::from_str(text).map_err(|err| PolicyError {
            line: line(err.span().map_or(0, |span| span.start)),
            message: err.message().replace('\n', " "),
        })?;
        let mut policy = match &file.base {
            None => Self::default(),
            Some(name) => Self::named(name.get_ref()).ok_or_else(|| PolicyError {
                line: line(name.span().start),
                message: format!("base: '{}' is unknown: use dedicated or desktop", name.get_ref()),
            })?,
        };
        for (key, rule, given) in [
            ("start", &mut policy.start, &file.start),
            ("suspend", &mut policy.suspend, &file.suspend),
            ("continue", &mut policy.resume, &file.resume),
            ("evict", &mut policy.evict, &file.evict),
            ("kill", &mut policy.kill, &file.kill),
        ] {
            if let Some(given) = given {
                *rule = Expr::parse_with(given.get_ref(), NAMES).map_err(|err| PolicyError {
                    line: line(given.span().start),
                    message: format!("{key}: {err}"),
                })?;
            }
        }
        Ok(policy)
    }
}

/// What the machine is doing, as far as its owner's rules can ask.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Owner {
    /// The load average of the last minute without this worker's jobs.
    pub load: f64,
    /// Seconds since somebody last typed.
    pub idle: f64,
    /// The hour of the day with its fraction, local time.
    pub hour: f64,
    /// The day of the week, Monday is 1.
    pub weekday: f64,
    /// The charge of the battery from 0 to 1, if there is one.
    pub battery: Option<f64>,
    /// No power from the mains.
    pub on_battery: bool,
    /// Memory that is available, in bytes.
    pub memory_free: f64,
    /// Processors of the host.
    pub cpus: f64,
    /// `harrier worker busy` was said.
    pub busy: bool,
    /// Jobs on this host.
    pub running: f64,
    /// Seconds since jobs were suspended.
    pub suspended_for: Option<f64>,
    /// Seconds since jobs are being given back.
    pub evicting_for: Option<f64>,
}

impl Scope for Owner {
    fn value(&self, name: &str) -> Value {
        let optional = |value: Option<f64>| value.map_or(Value::Undefined, Value::Number);
        match name {
            "load" => Value::Number(self.load),
            "idle" => Value::Number(self.idle),
            "hour" => Value::Number(self.hour),
            "weekday" => Value::Number(self.weekday),
            "battery" => optional(self.battery),
            "on_battery" => Value::Bool(self.on_battery),
            "memory_free" => Value::Number(self.memory_free),
            "cpus" => Value::Number(self.cpus),
            "busy" => Value::Bool(self.busy),
            "running" => Value::Number(self.running),
            "suspended_for" => optional(self.suspended_for),
            "evicting_for" => optional(self.evicting_for),
            _ => Value::Undefined,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policies_that_come_with_the_program_are_right() {
        for texts in [DEDICATED, DESKTOP] {
            for text in texts {
                Expr::parse_with(text, NAMES).unwrap();
            }
        }
        let away = Owner { idle: 3600.0, cpus: 4.0, memory_free: 4e9, hour: 3.0, ..Owner::default() };
        let typing = Owner { idle: 1.0, ..away };
        let desktop = Policy::named("desktop").unwrap();
        assert!(desktop.start.is_true(&away) && !desktop.suspend.is_true(&away));
        assert!(!desktop.start.is_true(&typing) && desktop.suspend.is_true(&typing));
        let dedicated = Policy::default();
        assert!(dedicated.start.is_true(&typing) && !dedicated.suspend.is_true(&typing));
        let busy = Owner { busy: true, suspended_for: Some(601.0), ..away };
        assert!(dedicated.suspend.is_true(&busy) && dedicated.evict.is_true(&busy));
        assert!(!dedicated.evict.is_true(&away), "nothing is suspended");
    }

    #[test]
    fn a_file_changes_single_rules_and_its_mistakes_name_their_line() {
        let policy = Policy::parse("base = 'desktop'\nstart = 'hour >= 20 || hour < 6'\n").unwrap();
        assert!(policy.start.is_true(&Owner { hour: 21.5, ..Owner::default() }));
        assert_eq!(policy.suspend, Policy::named("desktop").unwrap().suspend);
        for (text, line, part) in [
            ("start = 'busy'\nstop = 'x'", 2, "stop"),
            ("\nsuspend = 'bussy'", 2, "'bussy' is unknown"),
            ("start = 'busy &'", 1, "&&"),
            ("base = 'laptop'", 1, "dedicated or desktop"),
            ("start = 5", 1, "string"),
        ] {
            let err = Policy::parse(text).unwrap_err();
            assert!(err.line == line && err.message.contains(part), "{text:?}: {err}");
        }
    }
}
