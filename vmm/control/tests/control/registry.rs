//! Names, lives and leftovers.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use harrier_control::{ExitRecord, Life, NewMachine, Registry, RegistryError};

use crate::support::{claim, registry};

fn exit(code: u8) -> ExitRecord {
    ExitRecord { exit_code: code, error: None, started_ms: Some(1), ended_ms: 2 }
}

#[test]
fn a_machine_lives_as_long_as_its_lock_is_held() {
    let (_folder, registry) = registry();
    let seat = claim(&registry, "a").sit_down().unwrap();
    seat.ready().unwrap();
    assert_eq!(registry.find("a").unwrap().life, Life::Alive);
    assert!(matches!(registry.remove(&registry.find("a").unwrap()), Err(RegistryError::Alive(_))));
    seat.finish(&exit(7));
    // What is written before the lock is given back does not end it.
    assert_eq!(registry.find("a").unwrap().life, Life::Alive);
    drop(seat);
    let entry = registry.find("a").unwrap();
    assert_eq!(entry.life, Life::Ended(exit(7)));
    assert_eq!(entry.wait().unwrap(), Life::Ended(exit(7)));
    registry.remove(&entry).unwrap();
    assert!(matches!(registry.find("a"), Err(RegistryError::NotFound(_))));
    assert!(matches!(registry.remove(&entry), Err(RegistryError::NotFound(_))));
}

#[test]
fn a_monitor_that_was_killed_leaves_a_lost_machine_or_nothing() {
    let (_folder, registry) = registry();
    // It had run: known to be lost, and its name is taken until it is removed.
    let seat = claim(&registry, "ran").sit_down().unwrap();
    seat.ready().unwrap();
    let listener = seat.listen().unwrap();
    let folder = seat.folder().clone();
    drop((seat, listener));
    assert!(folder.socket().exists());
    assert_eq!(registry.find("ran").unwrap().life, Life::Lost);
    assert!(!folder.socket().exists());
    // It never ran.
    drop(claim(&registry, "never").sit_down().unwrap());
    drop(claim(&registry, "not-even-a-monitor"));
    // It was to be removed at its end.
    let new = NewMachine { name: Some("brief".parse().unwrap()), auto_remove: true, ..NewMachine::default() };
    let seat = registry.create(new).unwrap().sit_down().unwrap();
    seat.ready().unwrap();
    drop(seat);
    let names: Vec<String> =
        registry.list().unwrap().iter().map(|entry| entry.record.name.to_string()).collect();
    assert_eq!(names, ["ran"]);
    assert_eq!(fs::read_dir(registry.root()).unwrap().count(), 2, "the lock and one machine");
}

#[test]
fn of_many_that_want_a_name_one_gets_it() {
    let (_folder, registry) = registry();
    let won = AtomicUsize::new(0);
    let claims: Vec<_> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..16)
            .map(|_| {
                scope.spawn(|| {
                    let new = NewMachine { name: Some("one".parse().unwrap()), ..NewMachine::default() };
                    let claim = Registry::open(registry.root()).unwrap().create(new);
                    if let Err(err) = &claim {
                        assert!(matches!(err, RegistryError::NameTaken(_)), "{err}");
                    } else {
                        won.fetch_add(1, Ordering::Relaxed);
                    }
                    claim
                })
            })
            .collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(won.load(Ordering::Relaxed), 1);
    assert_eq!(registry.list().unwrap().len(), 1);
    drop(claims);
    assert_eq!(registry.list().unwrap().len(), 0);
}

#[test]
fn machines_are_found_by_id_name_and_the_beginning_of_an_id() {
    let (_folder, registry) = registry();
    let claims: Vec<_> = (0..40).map(|_| registry.create(NewMachine::default()).unwrap()).collect();
    for claim in &claims {
        let id = claim.record().id.to_string();
        assert_eq!(registry.find(&id).unwrap().record, *claim.record());
        assert_eq!(registry.find(claim.record().name.as_str()).unwrap().record, *claim.record());
        let of_prefix =
            claims.iter().filter(|other| other.record().id.as_str().starts_with(&id[..4])).count();
        if of_prefix == 1 {
            assert_eq!(registry.find(&id[..4]).unwrap().record, *claim.record());
        }
    }
    // Forty ids have sixteen first digits.
    let ambiguous = claims.iter().filter(|claim| {
        matches!(registry.find(&claim.record().id.as_str()[..1]), Err(RegistryError::Ambiguous(_, 2..)))
    });
    assert!(ambiguous.count() > 0);
    for nobody in ["", "zz", "..", "/", "0123456789abcdef"] {
        assert!(matches!(registry.find(nobody), Err(RegistryError::NotFound(_))), "{nobody}");
    }
}

#[test]
fn an_end_is_heard_of_by_those_who_wait_even_when_everything_is_removed() {
    let (_folder, registry) = registry();
    let new = NewMachine { name: Some("brief".parse().unwrap()), auto_remove: true, ..NewMachine::default() };
    let seat = registry.create(new).unwrap().sit_down().unwrap();
    seat.ready().unwrap();
    let entry = registry.find("brief").unwrap();
    assert_eq!(entry.wait_within(Some(Duration::from_millis(10))).unwrap(), None);
    let waiting = std::thread::spawn(move || entry.wait().unwrap());
    std::thread::sleep(Duration::from_millis(50));
    seat.finish(&exit(3));
    assert!(!seat.folder().path().exists());
    drop(seat);
    assert_eq!(waiting.join().unwrap(), Life::Ended(exit(3)));
}

#[test]
fn a_directory_that_others_can_enter_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("machines");
    fs::create_dir(&root).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(matches!(Registry::open(&root), Err(RegistryError::NotPrivate { .. })));
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
    Registry::open(&root).unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&root, &link).unwrap();
    assert!(matches!(Registry::open(&link), Err(RegistryError::NotPrivate { .. })));
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(Registry::open(&file).is_err());
}

#[test]
fn foreign_and_damaged_folders_are_no_machines_and_in_nobodys_way() {
    let (_folder, registry) = registry();
    let good = claim(&registry, "good").sit_down().unwrap();
    for (name, record) in [("aaaaaaaaaaaa", "{"), ("bbbbbbbbbbbb", "{\"version\":9}"), ("cccccccccccc", "")] {
        fs::create_dir(registry.root().join(name)).unwrap();
        fs::write(registry.root().join(name).join("machine.json"), record).unwrap();
    }
    fs::create_dir(registry.root().join("dddddddddddd")).unwrap();
    fs::create_dir(registry.root().join("something")).unwrap();
    fs::write(registry.root().join("eeeeeeeeeeee"), "").unwrap();
    fs::create_dir(registry.root().join(".new-ffffffffffff")).unwrap();
    assert_eq!(registry.list().unwrap().len(), 1);
    assert!(!registry.root().join(".new-ffffffffffff").exists());
    assert!(registry.root().join("something").exists());
    drop(good);
}

#[test]
fn sockets_work_below_paths_that_are_too_long_for_an_address() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("x".repeat(120)).join("machines");
    let registry = Registry::open(root).unwrap();
    let seat = claim(&registry, "a").sit_down().unwrap();
    let listener = seat.listen().unwrap();
    let client = std::thread::spawn({
        let folder = seat.folder().clone();
        move || harrier_control::Client::new(&folder).info().unwrap_err()
    });
    drop(listener.accept().unwrap());
    client.join().unwrap();
}
