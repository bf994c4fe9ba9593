//! What a command may do in its machine: user, namespaces, limits.

use harrier_jobs::{CommandSpec, Limits, User};
use thiserror::Error;

use crate::flags::LimitFlags;
use crate::units::{UnitError, parse_size};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LimitsConfig {
    user: Option<User>,
    isolate: bool,
    limits: Limits,
}

#[derive(Debug, Error)]
pub(crate) enum LimitFlagError {
    #[error("--user '{0}' is no user: give UID, UID:GID or a name")]
    User(String),
    #[error("--cpu-limit '{0}' is no share: give percent of one processor, 1 or more")]
    Cpu(String),
    #[error("--process-limit '{0}' is no number of processes: give 1 or more")]
    Processes(String),
    #[error("--{0}: {1}")]
    Size(&'static str, UnitError),
}

impl LimitsConfig {
    pub(crate) fn from_flags(flags: &LimitFlags) -> Result<Self, LimitFlagError> {
        let size = |name, text: &Option<String>| {
            text.as_deref().map(parse_size).transpose().map_err(|err| LimitFlagError::Size(name, err))
        };
        let count = |text: &Option<String>| -> Result<Option<u32>, String> {
            let number = |text: &String| text.parse().ok().filter(|n| *n > 0).ok_or_else(|| text.clone());
            text.as_ref().map(number).transpose()
        };
        Ok(LimitsConfig {
            user: flags.user.as_deref().map(parse_user).transpose()?,
            isolate: flags.isolate,
            limits: Limits {
                cpu_percent: count(&flags.cpu_limit).map_err(LimitFlagError::Cpu)?,
                memory_bytes: size("memory-limit", &flags.memory_limit)?,
                processes: count(&flags.process_limit).map_err(LimitFlagError::Processes)?,
                disk_bytes: size("disk-limit", &flags.disk_limit)?,
            },
        })
    }

    pub(crate) fn apply_to(&self, spec: &mut CommandSpec) {
        spec.user = self.user.clone();
        spec.isolate = self.isolate;
        spec.limits = self.limits;
    }
}

/// A number alone is user and group.
fn parse_user(text: &str) -> Result<User, LimitFlagError> {
    let wrong = || LimitFlagError::User(text.to_owned());
    let is_name = |name: &str| !name.is_empty() && name.len() <= 256 && !name.contains([':', '\0', '\n']);
    match text.split_once(':') {
        Some((uid, gid)) => {
            Ok(User::Ids { uid: uid.parse().map_err(|_| wrong())?, gid: gid.parse().map_err(|_| wrong())? })
        }
        None => match text.parse() {
            Ok(uid) => Ok(User::Ids { uid, gid: uid }),
            Err(_) if is_name(text) => Ok(User::Name(text.as_bytes().to_vec())),
            Err(_) => Err(wrong()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers_or_names() {
        assert_eq!(parse_user("1000").unwrap(), User::Ids { uid: 1000, gid: 1000 });
        assert_eq!(parse_user("7:8").unwrap(), User::Ids { uid: 7, gid: 8 });
        assert_eq!(parse_user("nobody").unwrap(), User::Name(b"nobody".to_vec()));
        for wrong in ["", "a:b", "1:", ":1", "4294967296:0", "a\nb"] {
            assert!(parse_user(wrong).is_err(), "{wrong:?}");
        }
    }
}
