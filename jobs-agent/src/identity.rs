//! `/run/harrier/identity`: who this machine is, for the programs in it. It is there once the machine has been restored or
//! forked.

use std::fs;
use std::io;
use std::path::Path;

use harrier_agent_protocol::{Attach, Role};

/// Where the agent puts what programs may look for.
pub(crate) const FOLDER: &str = "/run/harrier";
const NAME: &str = "identity";

/// The roles by their numbers, `HARRIER_ROLE_*` of linux/harrier_hypercall.h.
pub(crate) const ROLES: [&str; 4] = ["original", "restored", "clone", "migrated"];

/// What the file says: one `NAME=VALUE` a line, which a shell can source.
pub(crate) fn text(role: &str, generation: u64, index: u32) -> String {
    format!("HARRIER_ROLE={role}\nHARRIER_GENERATION={generation}\nHARRIER_CLONE_INDEX={index}\n")
}

/// Writes the file anew; who reads it sees the old one or the new one.
pub(crate) fn write(attach: &Attach) -> io::Result<()> {
    let folder = Path::new(FOLDER);
    let new = folder.join(format!(".{NAME}"));
    let [original, restored, clone, migrated] = ROLES;
    let role = match attach.role {
        Role::Same => original,
        Role::Restored => restored,
        Role::Forked => clone,
        Role::Migrated => migrated,
    };
    let text = text(role, attach.generation.into(), attach.clone_index);
    // Usually the folder is there, and a restored machine is to answer soon.
    if fs::write(&new, &text).is_err() {
        fs::create_dir_all(folder)?;
        fs::write(&new, &text)?;
    }
    fs::rename(&new, folder.join(NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_can_source_it() {
        assert_eq!(text("clone", 2, 7), "HARRIER_ROLE=clone\nHARRIER_GENERATION=2\nHARRIER_CLONE_INDEX=7\n");
    }
}
