//! Templates for warm starts: snapshots taken right after a machine's agent came up, one for each kind of machine that
//! jobs ask for. The first job of a kind boots as ever, and a template is made beside it; those that follow begin in
//! copies. What they do not write they share with the template's file, and all templates together are bounded.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::checkpoint::stored_bytes;
use crate::queue::JobSpec;

/// How long no template is made of a kind for which it did not work.
const RETRY: Duration = Duration::from_secs(600);

/// Jobs with the same kind can share a template.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    cpus: u32,
    memory_bytes: u64,
    engine: String,
    cpu_model: Option<String>,
    /// Path, length and time of its change: another file under the same name is another kind.
    rootfs: Option<(String, u64, i64)>,
}

impl Kind {
    pub(super) fn of(spec: &JobSpec) -> Option<Self> {
        let rootfs = match &spec.rootfs {
            None => None,
            Some(path) => {
                let metadata = fs::metadata(path).ok()?;
                Some((path.clone(), metadata.len(), metadata.mtime()))
            }
        };
        Some(Self {
            cpus: spec.cpus,
            memory_bytes: spec.memory_bytes,
            engine: spec.engine.clone(),
            cpu_model: spec.cpu_model.clone(),
            rootfs,
        })
    }
}

enum Template {
    /// It is being made.
    Making,
    Ready {
        folder: PathBuf,
        bytes: u64,
        used: Instant,
    },
    /// It did not work.
    Failed(Instant),
}

/// A worker's templates.
pub(super) struct Warm {
    program: PathBuf,
    run_flags: Vec<OsString>,
    /// Emptied when the worker begins: a template knows one version of guest and program.
    folder: PathBuf,
    machines: PathBuf,
    limit_bytes: u64,
    templates: Mutex<Pool>,
}

#[derive(Default)]
struct Pool {
    templates: HashMap<Kind, Template>,
    made: u64,
}

impl Warm {
    /// Templates below `state`, of so many bytes in all; none if that is 0.
    pub(super) fn new(
        program: &Path,
        state: &Path,
        machines: &Path,
        run_flags: &[OsString],
        limit_bytes: u64,
    ) -> std::io::Result<Arc<Self>> {
        let folder = super::empty_folder(state.join("warm"))?;
        Ok(Arc::new(Self {
            program: program.to_owned(),
            run_flags: run_flags.to_owned(),
            folder,
            machines: machines.to_owned(),
            limit_bytes,
            templates: Mutex::default(),
        }))
    }

    /// The template for a job; `None` if there is none yet, in which case one is made.
    pub(super) fn template(self: &Arc<Self>, spec: &JobSpec) -> Option<PathBuf> {
        if self.limit_bytes == 0 {
            return None;
        }
        let kind = Kind::of(spec)?;
        let mut pool = self.templates.lock().unwrap_or_else(PoisonError::into_inner);
        match pool.templates.get_mut(&kind) {
            Some(Template::Ready { folder, used, .. }) => {
                *used = Instant::now();
                return Some(folder.clone());
            }
            Some(Template::Failed(at)) if at.elapsed() > RETRY => {}
            Some(_) => return None,
            None => {}
        }
        // One at a time: jobs want the processors, too.
        if pool.templates.values().any(|template| matches!(template, Template::Making)) {
            return None;
        }
        pool.templates.insert(kind.clone(), Template::Making);
        pool.made += 1;
        let target = self.folder.join(pool.made.to_string());
        drop(pool);
        let warm = self.clone();
        let spawned =
            thread::Builder::new().name("template".to_owned()).spawn(move || warm.make(kind, target));
        if let Err(err) = spawned {
            log::warn!("no thread for a template: {err}");
        }
        None
    }

    fn make(&self, kind: Kind, target: PathBuf) {
        let made = self.run(&kind, &target);
        let mut pool = self.templates.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = stored_bytes(&target);
        if let Err(reason) = made {
            log::warn!("no template for warm starts: {reason}");
            pool.templates.insert(kind, Template::Failed(Instant::now()));
            return;
        }
        if bytes > self.limit_bytes {
            log::info!("a template of {bytes} bytes is larger than all may be");
            pool.templates.insert(kind, Template::Failed(Instant::now()));
            let _ = fs::remove_dir_all(&target);
            return;
        }
        pool.templates.insert(kind, Template::Ready { folder: target, bytes, used: Instant::now() });
        pool.shrink(self.limit_bytes);
    }

    fn run(&self, kind: &Kind, target: &Path) -> Result<(), String> {
        let mut command = Command::new(&self.program);
        command.arg("--runtime-dir").arg(&self.machines).args(["run", "--quiet", "--timeout", "60s"]);
        command.arg("--template").arg(target).args(&self.run_flags).args(["--engine", &kind.engine]);
        command.args(["--cpus", &kind.cpus.to_string(), "--memory", &kind.memory_bytes.to_string()]);
        if let Some(model) = &kind.cpu_model {
            command.args(["--cpu-model", model]);
        }
        if let Some((path, ..)) = &kind.rootfs {
            command.args(["--rootfs", path]);
        }
        command.args(["--", "template"]).stdin(Stdio::null()).stdout(Stdio::null());
        let output = command.output().map_err(|err| err.to_string())?;
        if output.status.success() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }

    /// A job could not be started from this template: the next of its kind boots.
    pub(super) fn spoil(&self, spoilt: &Path) {
        let mut pool = self.templates.lock().unwrap_or_else(PoisonError::into_inner);
        for template in pool.templates.values_mut() {
            if matches!(template, Template::Ready { folder, .. } if folder == spoilt) {
                *template = Template::Failed(Instant::now());
                // Machines that were made of it keep what they have mapped.
                let _ = fs::remove_dir_all(spoilt);
            }
        }
    }
}

impl Pool {
    /// Gives up what was used least lately, until all fit.
    fn shrink(&mut self, limit: u64) {
        loop {
            let ready = |(kind, template): (&Kind, &Template)| match template {
                Template::Ready { bytes, used, .. } => Some((*used, *bytes, kind.clone())),
                Template::Making | Template::Failed(_) => None,
            };
            let all: Vec<(Instant, u64, Kind)> = self.templates.iter().filter_map(ready).collect();
            if all.iter().map(|(_, bytes, _)| bytes).sum::<u64>() <= limit {
                return;
            }
            let Some((_, _, oldest)) = all.into_iter().min_by_key(|(used, ..)| *used) else { return };
            if let Some(Template::Ready { folder, .. }) = self.templates.remove(&oldest) {
                // Machines that were made of it keep what they have mapped.
                let _ = fs::remove_dir_all(folder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_least_lately_goes_first() {
        let folder = tempfile::tempdir().unwrap();
        let mut pool = Pool::default();
        let begin = Instant::now();
        let kind = |cpus| Kind::of(&JobSpec { cpus, ..JobSpec::default() }).unwrap();
        for (cpus, age) in [(1, 2), (2, 1), (3, 3)] {
            let folder = folder.path().join(cpus.to_string());
            fs::create_dir(&folder).unwrap();
            let used = begin + Duration::from_secs(10 - age);
            pool.templates.insert(kind(cpus), Template::Ready { folder, bytes: 100, used });
        }
        pool.shrink(300);
        assert_eq!(pool.templates.len(), 3);
        pool.shrink(150);
        assert!(pool.templates.len() == 1 && pool.templates.contains_key(&kind(2)));
        assert!(!folder.path().join("3").exists() && folder.path().join("2").exists());
    }

    #[test]
    fn another_image_under_the_same_name_is_another_kind() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        let spec = JobSpec { rootfs: Some(image.to_str().unwrap().to_owned()), ..JobSpec::default() };
        assert_eq!(Kind::of(&spec), None, "it is not there");
        fs::write(&image, "one").unwrap();
        let one = Kind::of(&spec);
        fs::write(&image, "another").unwrap();
        assert_ne!(Kind::of(&spec), one);
    }
}
