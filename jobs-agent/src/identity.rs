//! `/run/harrier/identity`: who this machine is, for the programs in it. It is there once the machine has been restored or
//! forked.

use std::fs;
use std::io;
use std::path::Path;

use harrier_agent_protocol::{Attach, Role};

const FOLDER: &str = "/run/harrier";
const NAME: &str = "identity";

/// What the file says: one `NAME=VALUE` a line, which a shell can source.
fn text(attach: &Attach) -> String {
    let role = match attach.role {
        Role::Same => "original",
        Role::Restored => "restored",
        Role::Forked => "clone",
        Role::Migrated => "migrated",
    };
    let (generation, index) = (attach.generation, attach.clone_index);
    format!("HARRIER_ROLE={role}\nHARRIER_GENERATION={generation}\nHARRIER_CLONE_INDEX={index}\n")
}

/// Writes the file anew; who reads it sees the old one or the new one.
pub(crate) fn write(attach: &Attach) -> io::Result<()> {
    let folder = Path::new(FOLDER);
    fs::create_dir_all(folder)?;
    let new = folder.join(format!(".{NAME}"));
    fs::write(&new, text(attach))?;
    fs::rename(&new, folder.join(NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_can_source_it() {
        let attach = Attach { role: Role::Forked, generation: 2, clone_index: 7, ..Attach::default() };
        assert_eq!(text(&attach), "HARRIER_ROLE=clone\nHARRIER_GENERATION=2\nHARRIER_CLONE_INDEX=7\n");
    }
}
