//! Where the user's machines are kept.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use harrier_control::{Registry, RegistryError};

/// Opens the registry: in the directory of the flag, else of the environment, else in the user's own.
pub(crate) fn open(flag: Option<&Path>) -> Result<Registry, RegistryError> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let uid = rustix::process::geteuid().as_raw();
    Registry::open(choose(flag, set, uid, &|path| is_own_folder(path, uid)))
}

fn choose(
    flag: Option<&Path>,
    set: impl Fn(&str) -> Option<PathBuf>,
    uid: u32,
    usable: &dyn Fn(&Path) -> bool,
) -> PathBuf {
    if let Some(folder) = flag.map(Path::to_owned).or_else(|| set("HARRIER_RUNTIME_DIR")) {
        return folder;
    }
    // The variable may be left over from another user (sudo, su), or name what a log-out has taken away.
    let session = set("XDG_RUNTIME_DIR").unwrap_or_else(|| PathBuf::from(format!("/run/user/{uid}")));
    if usable(&session) {
        return session.join("harrier");
    }
    let shared = if uid == 0 { "/run" } else { "/tmp" };
    Path::new(shared).join(format!("harrier-{uid}"))
}

fn is_own_folder(path: &Path, uid: u32) -> bool {
    path.is_absolute() && fs::metadata(path).is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_goes_before_the_environment_and_that_before_the_session() {
        let set = |name: &str| match name {
            "HARRIER_RUNTIME_DIR" => Some(PathBuf::from("/h")),
            _ => Some(PathBuf::from("/x")),
        };
        let session = |name: &str| (name == "XDG_RUNTIME_DIR").then(|| PathBuf::from("/x"));
        let own: &dyn Fn(&Path) -> bool = &|path| path == Path::new("/x");
        assert_eq!(choose(Some(Path::new("f")), set, 7, own), Path::new("f"));
        assert_eq!(choose(None, set, 7, own), Path::new("/h"));
        assert_eq!(choose(None, session, 7, own), Path::new("/x/harrier"));
        assert_eq!(choose(None, session, 7, &|_| false), Path::new("/tmp/harrier-7"));
        assert_eq!(choose(None, |_| None, 0, &|_| false), Path::new("/run/harrier-0"));
        let systemd: &dyn Fn(&Path) -> bool = &|path| path == Path::new("/run/user/7");
        assert_eq!(choose(None, |_| None, 7, systemd), Path::new("/run/user/7/harrier"));
    }
}
