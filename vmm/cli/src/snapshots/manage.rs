//! `harrier snapshots`: list, check, show and remove.

use std::io::Write;
use std::path::PathBuf;

use harrier_machine::snapshot::MachineState;
use harrier_snapshot::{Chain, Listed, Snapshot, compact, list, remove, sweep, verify};
use serde_json::{Value, json};

use super::{command_words, find, store};
use crate::exit::{Failure, HARRIER_FAILED};
use crate::flags::{SnapshotNamesFlags, SnapshotsCommand, SnapshotsLsFlags, SnapshotsVerifyFlags};
use crate::table;

/// Runs one of these commands and answers its exit code.
pub(crate) fn run(command: SnapshotsCommand) -> Result<u8, Failure> {
    match command {
        SnapshotsCommand::Ls(flags) => ls(&flags),
        SnapshotsCommand::Rm(flags) => rm(&flags),
        SnapshotsCommand::Verify(flags) => check(&flags),
        SnapshotsCommand::Inspect(flags) => inspect(&flags),
        SnapshotsCommand::Compact(flags) => make_full(&flags),
    }
}

fn print(text: &str) -> Result<(), Failure> {
    writeln!(std::io::stdout(), "{text}")
        .map_err(|err| Failure::new(format!("stdout cannot be written ({err})")))
}

fn name(path: &std::path::Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn ls(flags: &SnapshotsLsFlags) -> Result<u8, Failure> {
    let folder = match &flags.folder {
        Some(folder) => folder.clone(),
        None => store()?,
    };
    let missing = flags.folder.is_none() && !folder.exists();
    let listed = if missing { Vec::new() } else { list(&folder)? };
    if flags.json {
        let all: Vec<Value> = listed.iter().map(describe).collect();
        print(&Value::from(all).to_string())?;
        return Ok(0);
    }
    let header = ["NAME", "CREATED", "MEMORY", "STORED", "PARENT", "COMMAND"].map(str::to_owned);
    let mut rows = vec![header.to_vec()];
    let now = harrier_control::unix_ms();
    for Listed { path, snapshot } in &listed {
        rows.push(match snapshot {
            Ok(snapshot) => {
                let manifest = snapshot.manifest();
                let parent = manifest.parent.as_ref().map_or("-".to_owned(), |parent| parent.name.clone());
                vec![
                    name(path),
                    format!("{} ago", table::span(now.saturating_sub(manifest.created_ms))),
                    table::size(manifest.memory_bytes()),
                    table::size(stored_bytes(path)),
                    parent,
                    command_words(snapshot).join(" "),
                ]
            }
            Err(err) => vec![name(path), "-".into(), "-".into(), "-".into(), "-".into(), err.to_string()],
        });
    }
    print(table::aligned(&rows).trim_end())?;
    Ok(0)
}

/// What the snapshot takes on its disk.
fn stored_bytes(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let files = std::fs::read_dir(path).into_iter().flatten().flatten();
    files.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}

fn describe(Listed { path, snapshot }: &Listed) -> Value {
    match snapshot {
        Ok(snapshot) => describe_one(snapshot),
        Err(err) => json!({ "path": path, "error": err.to_string() }),
    }
}

fn describe_one(snapshot: &Snapshot) -> Value {
    let path = snapshot.path();
    let manifest = serde_json::to_value(snapshot.manifest()).unwrap_or_default();
    let machine = MachineState::read(snapshot).ok().and_then(|state| serde_json::to_value(state).ok());
    json!({
        "path": path,
        "stored_bytes": stored_bytes(path),
        "machine": machine,
        "manifest": manifest,
    })
}

fn inspect(flags: &SnapshotNamesFlags) -> Result<u8, Failure> {
    let mut all = Vec::new();
    for name in &flags.snapshots {
        let path = find(name)?;
        let chain = Chain::open(&path)?;
        let mut described = describe_one(chain.snapshot());
        let sections = chain.snapshot().sections()?;
        let content: serde_json::Map<String, Value> = sections
            .into_iter()
            .map(|section| {
                let value = serde_json::from_slice(&section.bytes).unwrap_or(Value::Null);
                (section.name, value)
            })
            .collect();
        let parents: Vec<PathBuf> =
            chain.snapshots().skip(1).map(|parent| parent.path().to_owned()).collect();
        if let Some(members) = described.as_object_mut() {
            members.insert("parents".to_owned(), json!(parents));
            members.insert("sections".to_owned(), content.into());
        }
        all.push(described);
    }
    let text = serde_json::to_string_pretty(&all).map_err(Failure::new)?;
    print(&text)?;
    Ok(0)
}

fn make_full(flags: &SnapshotNamesFlags) -> Result<u8, Failure> {
    for name in &flags.snapshots {
        let full = compact(&find(name)?)?;
        print(&full.path().display().to_string())?;
    }
    Ok(0)
}

fn check(flags: &SnapshotsVerifyFlags) -> Result<u8, Failure> {
    let mut code = 0;
    let mut all = Vec::new();
    for name in &flags.snapshots {
        let found = verify(&find(name)?)?;
        if !found.is_empty() {
            code = HARRIER_FAILED;
        }
        for damage in &found {
            let (snapshot, part, offset) = (&damage.snapshot, &damage.part, damage.offset);
            if !flags.json {
                let range =
                    if damage.bytes > 0 { format!(" ({} bytes)", damage.bytes) } else { String::new() };
                print(&format!(
                    "{}: {part} at offset {offset}{range}: {}",
                    snapshot.display(),
                    damage.reason
                ))?;
            }
            all.push(json!({
                "snapshot": snapshot,
                "part": part,
                "offset": offset,
                "bytes": damage.bytes,
                "reason": damage.reason,
            }));
        }
        if found.is_empty() && !flags.json {
            print(&format!("{}: whole", name.display()))?;
        }
    }
    if flags.json {
        print(&Value::from(all).to_string())?;
    }
    Ok(code)
}

fn rm(flags: &SnapshotNamesFlags) -> Result<u8, Failure> {
    let mut code = 0;
    // Those that need others go before them: the last named first would do as well.
    let mut left: Vec<PathBuf> = flags.snapshots.iter().map(|name| find(name)).collect::<Result<_, _>>()?;
    loop {
        let before = left.len();
        left.retain(|path| match remove(path) {
            Ok(()) => print(&path.display().to_string()).is_err(),
            Err(harrier_snapshot::SnapshotError::Needed { .. }) => true,
            Err(err) => {
                crate::print_failure(&Failure::new(err));
                code = HARRIER_FAILED;
                false
            }
        });
        if left.is_empty() || left.len() == before {
            break;
        }
    }
    for path in &left {
        if let Err(err) = remove(path) {
            crate::print_failure(&Failure::new(err));
            code = HARRIER_FAILED;
        }
    }
    if let Ok(store) = store()
        && store.exists()
        && let Err(err) = sweep(&store)
    {
        log::debug!("{err}");
    }
    Ok(code)
}
