//! The suite. Each test has a store of its own.

use std::collections::HashSet;
use std::sync::Mutex;

use harrier_jobs::files::FileFacts;
use harrier_jobs::protocol::Stream;
use harrier_jobs::queue::{
    Checkpoint, Dependency, DependencyKind, HostAd, InputFile, JobId, LeaseKey, NewJob, Reason, State,
    StoredFile, Times, Wanted,
};
use harrier_jobs::store::files::{download, upload};
use harrier_jobs::store::{
    Action, CheckpointFile, CheckpointPiece, CheckpointQuery, ClaimRequest, Ended, EventQuery, OutputQuery,
    Report, StoreError,
};

use crate::stores::{Fixture, LEASE_MS, ended, free};

fn state(f: &Fixture, id: JobId) -> (State, Reason) {
    let job = f.store.job(id).unwrap();
    (job.state, job.reason)
}

fn act(f: &Fixture, action: Action, id: JobId) -> (bool, bool, State) {
    let result = f.store.act(&action, &[id]).unwrap().remove(0);
    assert_eq!(result.job, id);
    (result.changed, result.refused, result.state)
}

pub(crate) fn a_job_is_claimed_once_and_ends_once(f: &Fixture) {
    f.host("a", |_| {});
    f.host("b", |_| {});
    assert!(f.claim("a", 1).is_empty(), "nothing is there yet");
    let id = f.plain();
    assert_eq!(state(f, id), (State::Queued, Reason::Waiting));
    let claim = f.claim_one("a");
    assert_eq!((claim.key.job, claim.key.epoch, claim.lease_ms), (id, 1, LEASE_MS));
    assert!(f.claim("b", 1).is_empty(), "it is taken");
    assert_eq!(state(f, id), (State::Starting, Reason::Claimed));
    f.start(&claim.key);
    assert_eq!(state(f, id), (State::Running, Reason::Started));
    f.end(&claim.key, Reason::Exited, Some(0));
    let job = f.store.job(id).unwrap();
    assert_eq!(
        (job.state, job.exit_code, job.host, job.lease_until_ms),
        (State::Succeeded, Some(0), None, None)
    );
    assert!(f.claim("b", 1).is_empty());
    let failing = f.plain();
    let claim = f.claim_one("a");
    f.end(&claim.key, Reason::Exited, Some(3));
    assert_eq!(f.store.job(failing).unwrap().exit_code, Some(3));
    assert_eq!(state(f, failing), (State::Failed, Reason::Exited));
}

pub(crate) fn a_lease_that_is_not_renewed_is_given_to_another_and_its_holder_is_fenced(f: &Fixture) {
    f.host("a", |_| {});
    f.host("b", |_| {});
    let id = f.plain();
    let first = f.claim_one("a");
    f.start(&first.key);
    f.pass(LEASE_MS - 1);
    let renewed = f.store.renew("a", std::slice::from_ref(&first.key)).unwrap();
    assert_eq!(renewed[0].lease.unwrap().lease_ms, LEASE_MS);
    f.pass(LEASE_MS - 1);
    assert_eq!(state(f, id).0, State::Running, "the renewal counts");
    f.pass(1);
    assert_eq!(state(f, id), (State::Queued, Reason::WorkerLost));
    f.pass(60_000);
    let second = f.claim_one("b");
    assert_eq!((second.key.job, second.key.epoch), (id, 2));
    assert_eq!(f.store.renew("a", std::slice::from_ref(&first.key)).unwrap()[0].lease, None);
    for report in [
        ended(Reason::Exited, Some(0)),
        Report::Started { engine: None, checkpoint: None },
        Report::Continued,
        Report::Activity(None),
    ] {
        assert!(matches!(f.store.report(&first.key, &report), Err(StoreError::Fenced(_))), "{report:?}");
    }
    assert!(matches!(
        f.store.write_output(&first.key, Stream::Stdout, 0, b"late"),
        Err(StoreError::Fenced(_))
    ));
    // The right epoch with a token that a power failure has made a stranger's.
    let forged = LeaseKey { token: first.key.token.clone(), ..second.key.clone() };
    assert!(matches!(f.store.report(&forged, &ended(Reason::Exited, Some(0))), Err(StoreError::Fenced(_))));
    f.end(&second.key, Reason::Exited, Some(7));
    assert_eq!(f.store.job(id).unwrap().exit_code, Some(7));
    let attempts = f.store.attempts(id).unwrap();
    assert_eq!(attempts.len(), 2);
    assert_eq!((attempts[0].reason, attempts[1].reason), (Some(Reason::WorkerLost), Some(Reason::Exited)));
}

pub(crate) fn an_end_that_is_told_twice_counts_once(f: &Fixture) {
    f.host("a", |_| {});
    let id = f.plain();
    let claim = f.claim_one("a");
    f.end(&claim.key, Reason::Exited, Some(0));
    for report in [ended(Reason::Exited, Some(0)), ended(Reason::Exited, Some(1))] {
        assert!(matches!(f.store.report(&claim.key, &report), Err(StoreError::Fenced(_))));
    }
    assert_eq!(f.store.job(id).unwrap().exit_code, Some(0));
    let ends = f.store.events(&EventQuery { job: Some(id), ..EventQuery::default() }).unwrap();
    assert_eq!(ends.iter().filter(|event| event.state == State::Succeeded).count(), 1);
}

pub(crate) fn priority_goes_before_age(f: &Fixture) {
    f.host("a", |_| {});
    let ids: Vec<JobId> =
        [0, 5, -5, 5].iter().map(|priority| f.submit("ann", |job| job.spec.priority = *priority)).collect();
    let order: Vec<JobId> = f.claim("a", 4).iter().map(|claim| claim.key.job).collect();
    assert_eq!(order, [ids[1], ids[3], ids[0], ids[2]]);
    let (low, high) = (f.plain(), f.plain());
    act(f, Action::Priority(9), high);
    assert_eq!(f.claim_one("a").key.job, high);
    assert_eq!(f.claim_one("a").key.job, low);
}

pub(crate) fn users_share_and_what_was_used_is_forgotten(f: &Fixture) {
    f.host("a", |_| {});
    // Ann has used an hour, Ben nothing; both then queue four jobs, Ann first.
    f.plain();
    let used = f.claim_one("a");
    for _ in 0..120 {
        f.pass(LEASE_MS - 1);
        f.store.renew("a", std::slice::from_ref(&used.key)).unwrap();
    }
    f.end(&used.key, Reason::Exited, Some(0));
    for user in ["ann", "ann", "ann", "ann", "ben", "ben", "ben", "ben"] {
        f.submit(user, |_| {});
    }
    let users = |count| -> Vec<String> {
        let claims = f.claim("a", count);
        claims.into_iter().map(|claim| claim.job.user).collect()
    };
    assert_eq!(users(4), ["ben"; 4]);
    let stats = f.store.stats().unwrap();
    let recent = |user: &str| {
        stats.users.iter().find(|known| known.user == user).map_or(0.0, |known| known.recent_cpu_seconds)
    };
    assert!((3500.0..3700.0).contains(&recent("ann")), "{}", recent("ann"));
    // After many half-lives nothing is left of it, and the two alternate.
    f.pass(30 * 24 * 3_600_000);
    f.host("a", |_| {});
    f.store.jobs(&Default::default()).unwrap();
    f.pass(3_600_000);
    let mut both = users(4);
    both.sort();
    assert_eq!(both, ["ann", "ann", "ben", "ben"]);
}

pub(crate) fn the_oldest_job_is_never_passed_over_for_ever(f: &Fixture) {
    f.host("a", |_| {});
    let poor = f.submit("ann", |job| job.spec.priority = -100);
    let mut turns = 0;
    loop {
        // Somebody always has something more important.
        f.submit("ben", |job| job.spec.priority = 100);
        let claim = f.claim_one("a");
        turns += 1;
        if claim.key.job == poor {
            break;
        }
        assert!(turns <= 20, "the oldest job starves");
        f.end(&claim.key, Reason::Exited, Some(0));
    }
}

pub(crate) fn hosts_get_only_what_suits_them_and_fits(f: &Fixture) {
    f.host("small", |ad| {
        ad.labels.insert("room".to_owned(), "lab".to_owned());
    });
    let impossible: Vec<JobId> = vec![
        f.submit("ann", |job| job.spec.cpus = 5),
        f.submit("ann", |job| job.spec.memory_bytes = 16 << 30),
        f.submit("ann", |job| job.spec.engine = "kvm".to_owned()),
        f.submit("ann", |job| job.spec.cpu_model = Some("v3".to_owned())),
        f.submit("ann", |job| job.spec.requirements = Some("memory >= 64G".to_owned())),
        f.submit("ann", |job| job.spec.requirements = Some("labels.room == 'office'".to_owned())),
        f.submit("ann", |job| job.spec.requirements = Some("labels.gpu == 'x'".to_owned())),
    ];
    let fitting = f.submit("ann", |job| {
        job.spec.requirements = Some("labels.room == 'lab' && cpus >= 2 && !(engine == 'kvm')".to_owned());
    });
    let claims = f.claim("small", 8);
    assert_eq!(claims.iter().map(|claim| claim.key.job).collect::<Vec<_>>(), [fitting]);
    f.host("large", |ad| {
        ad.cpus = 64;
        ad.memory_bytes = 128 << 30;
        ad.engines.push("kvm".to_owned());
        ad.cpu_models.push("v3".to_owned());
        ad.labels.insert("room".to_owned(), "office".to_owned());
        ad.labels.insert("gpu".to_owned(), "x".to_owned());
    });
    let request = ClaimRequest {
        host: "large".to_owned(),
        instance: "large-1".to_owned(),
        count: 8,
        free: harrier_jobs::queue::Free { slots: 8, cpus: 64, memory_bytes: 128 << 30 },
    };
    let taken: HashSet<JobId> = f.store.claim(&request).unwrap().iter().map(|claim| claim.key.job).collect();
    assert_eq!(taken, impossible.into_iter().collect());
    // One claim does not take more than is free, however many slots there are.
    for _ in 0..4 {
        f.submit("ann", |job| job.spec.memory_bytes = 3 << 30);
    }
    assert_eq!(f.claim("small", 4).len(), 2);
}

pub(crate) fn a_job_is_left_to_the_host_that_it_prefers_for_a_while(f: &Fixture) {
    f.host("small", |_| {});
    f.host("large", |ad| ad.memory_bytes = 64 << 30);
    let ranked = || f.submit("ann", |job| job.spec.rank = Some("memory".to_owned()));
    let first = ranked();
    assert!(f.claim("small", 1).is_empty(), "the other one is better");
    let taken = f.claim_one("large");
    assert_eq!(taken.key.job, first);
    // It waits for a while only, and for nobody who has no room or takes no jobs.
    let second = ranked();
    assert!(f.claim("small", 1).is_empty());
    f.pass(10_000);
    assert_eq!(f.claim_one("small").key.job, second);
    let full: fn(&mut HostAd) = |ad| ad.free.slots = 0;
    let closed: fn(&mut HostAd) = |ad| ad.closed = Some("its owner is there".to_owned());
    for change in [full, closed] {
        f.host("large", change);
        let next = ranked();
        assert_eq!(f.claim_one("small").key.job, next);
    }
    // One that has come back waits anew.
    f.host("large", |ad| ad.memory_bytes = 64 << 30);
    f.end(&taken.key, Reason::Vacated, None);
    assert!(f.claim("small", 1).is_empty());
    let request = ClaimRequest {
        host: "large".to_owned(),
        instance: "large-1".to_owned(),
        count: 1,
        free: harrier_jobs::queue::Free { slots: 4, cpus: 4, memory_bytes: 64 << 30 },
    };
    assert_eq!(f.store.claim(&request).unwrap()[0].key.job, first);
}

pub(crate) fn a_failed_command_is_retried_after_a_growing_wait(f: &Fixture) {
    f.host("a", |_| {});
    let id = f.submit("ann", |job| {
        job.spec.retries = 2;
        job.spec.retry_delay_ms = 10_000;
    });
    for (attempt, wait) in [(1, 10_000), (2, 20_000)] {
        let claim = f.claim_one("a");
        assert_eq!(claim.key.epoch, attempt);
        f.end(&claim.key, Reason::Exited, Some(1));
        assert_eq!(state(f, id), (State::Queued, Reason::Retry));
        f.pass(wait - 1);
        assert!(f.claim("a", 1).is_empty(), "not yet");
        f.pass(1);
    }
    let claim = f.claim_one("a");
    f.end(&claim.key, Reason::Exited, Some(4));
    let job = f.store.job(id).unwrap();
    assert_eq!((job.state, job.exit_code, job.retries_used), (State::Failed, Some(4), 2));
}

pub(crate) fn the_system_fails_a_job_so_often_before_it_is_held(f: &Fixture) {
    f.host("a", |_| {});
    let id = f.plain();
    let mut failures = 0;
    while f.store.job(id).unwrap().state == State::Queued {
        f.pass(3_600_000);
        let claim = f.claim_one("a");
        f.end(&claim.key, Reason::MachineFailed, None);
        failures += 1;
        assert!(failures < 20);
    }
    assert_eq!((state(f, id), failures), ((State::Held, Reason::SystemFailures), 5));
    act(f, Action::Release, id);
    let claim = f.claim_one("a");
    f.end(&claim.key, Reason::BadInput, None);
    assert_eq!(state(f, id), (State::Held, Reason::BadInput), "one that a person must mend is held at once");
}

pub(crate) fn jobs_wait_for_others(f: &Fixture) {
    f.host("a", |_| {});
    let (good, bad) = (f.plain(), f.plain());
    let after = |job: JobId, kind| {
        move |new: &mut harrier_jobs::queue::NewJob| new.after = vec![Dependency { job, kind }]
    };
    let after_good = f.submit("ann", after(good, DependencyKind::Success));
    let after_bad = f.submit("ann", after(bad, DependencyKind::Success));
    let after_any = f.submit("ann", after(bad, DependencyKind::End));
    let after_both = f.submit("ann", |new| {
        new.after = [good, bad].map(|job| Dependency { job, kind: DependencyKind::End }).to_vec();
    });
    assert_eq!(state(f, after_good), (State::Queued, Reason::Dependency));
    let claims = f.claim("a", 4);
    assert_eq!(claims.iter().map(|claim| claim.key.job).collect::<Vec<_>>(), [good, bad]);
    f.end(&claims[0].key, Reason::Exited, Some(0));
    assert_eq!(state(f, after_good), (State::Queued, Reason::Waiting));
    assert_eq!(f.store.job(after_both).unwrap().open_dependencies, 1);
    f.end(&claims[1].key, Reason::Exited, Some(1));
    assert_eq!(state(f, after_bad), (State::Held, Reason::DependencyFailed));
    let ready: Vec<JobId> = f.claim("a", 4).iter().map(|claim| claim.key.job).collect();
    assert_eq!(ready, [after_good, after_any, after_both]);
    // What has ended already decides at once.
    let late = f.submit("ann", after(good, DependencyKind::Success));
    assert_eq!(state(f, late).0, State::Queued);
    let too_late = f.submit("ann", after(bad, DependencyKind::Success));
    assert_eq!(state(f, too_late), (State::Held, Reason::DependencyFailed));
    act(f, Action::Release, too_late);
    assert_eq!(f.claim("a", 4).len(), 2);
}

pub(crate) fn actions_say_the_same_when_they_are_said_twice(f: &Fixture) {
    f.host("a", |_| {});
    let id = f.plain();
    let twice = |action: Action, expected: State| {
        let (changed, refused, now) = act(f, action.clone(), id);
        assert!(changed && !refused && now == expected, "{action:?}");
        let (changed, refused, now) = act(f, action.clone(), id);
        assert!(!changed && !refused && now == expected, "{action:?} again");
    };
    twice(Action::Hold, State::Held);
    twice(Action::Release, State::Queued);
    twice(Action::Priority(3), State::Queued);
    assert!(act(f, Action::Suspend, id).1, "a queued job has nothing to suspend");
    let claim = f.claim_one("a");
    f.start(&claim.key);
    for action in [Action::Suspend, Action::Checkpoint, Action::Hold, Action::Requeue, Action::Vacate] {
        twice(action, State::Running);
    }
    twice(Action::Resume, State::Running);
    // One whose worker has not heard of it yet is as good as resumed.
    twice(Action::Suspend, State::Running);
    f.store.report(&claim.key, &Report::Paused { reason: Reason::SuspendedByUser, detail: None }).unwrap();
    twice(Action::Resume, State::Paused);
    let again = f.store.act(&Action::Resume, &[id]).unwrap().remove(0);
    assert_eq!(again.message, "will go on already");
    f.store.report(&claim.key, &Report::Continued).unwrap();
    twice(Action::Cancel, State::Stopping);
    assert!(act(f, Action::Hold, id).1);
    f.end(&claim.key, Reason::Cancelled, None);
    assert_eq!(act(f, Action::Cancel, id), (false, false, State::Cancelled));
    for action in [Action::Hold, Action::Suspend, Action::Checkpoint, Action::Priority(1)] {
        assert!(act(f, action.clone(), id).1, "{action:?} of what has ended");
    }
    twice(Action::Requeue, State::Queued);
}

pub(crate) fn wishes_reach_the_worker_and_decide_where_the_job_goes(f: &Fixture) {
    f.host("a", |_| {});
    for (action, wish, reason, end) in [
        (Action::Hold, Wanted::HOLD, Reason::HeldByUser, State::Held),
        (Action::Vacate, Wanted::VACATE, Reason::Vacated, State::Queued),
        (Action::Requeue, Wanted::REQUEUE, Reason::Requeued, State::Queued),
        (Action::Cancel, Wanted::CANCEL, Reason::Cancelled, State::Cancelled),
    ] {
        let id = f.plain();
        let claim = f.claim_one("a");
        f.start(&claim.key);
        act(f, action.clone(), id);
        let renewal = f.store.renew("a", std::slice::from_ref(&claim.key)).unwrap().remove(0);
        assert!(renewal.lease.unwrap().wanted.has(wish), "{action:?}");
        f.end(&claim.key, reason, None);
        let job = f.store.job(id).unwrap();
        assert_eq!((job.state, job.wanted), (end, Wanted::default()), "{action:?}");
        act(f, Action::Cancel, id);
    }
    // A job that its host gives back while a user has it suspended does not start elsewhere.
    let id = f.plain();
    let claim = f.claim_one("a");
    f.start(&claim.key);
    act(f, Action::Suspend, id);
    f.store.report(&claim.key, &Report::Paused { reason: Reason::SuspendedByUser, detail: None }).unwrap();
    assert_eq!(state(f, id), (State::Paused, Reason::SuspendedByUser));
    f.end(&claim.key, Reason::Evicted, None);
    assert_eq!(state(f, id), (State::Held, Reason::HeldByUser));
    // One that ends by itself while it is to be held has ended.
    let id = f.plain();
    let claim = f.claim_one("a");
    act(f, Action::Hold, id);
    f.end(&claim.key, Reason::Exited, Some(0));
    assert_eq!(state(f, id), (State::Succeeded, Reason::Exited));
}

pub(crate) fn cancelling_works_in_every_state(f: &Fixture) {
    f.host("a", |_| {});
    let queued = f.plain();
    assert_eq!(act(f, Action::Cancel, queued).2, State::Cancelled);
    let held = f.submit("ann", |job| job.hold = true);
    assert_eq!(act(f, Action::Cancel, held).2, State::Cancelled);
    let reports: [&[Report]; 4] = [
        &[],
        &[Report::Started { engine: None, checkpoint: None }],
        &[
            Report::Started { engine: None, checkpoint: None },
            Report::Paused { reason: Reason::Owner, detail: None },
        ],
        &[Report::Stopping { reason: Reason::Evicted }],
    ];
    for reports in reports {
        let id = f.plain();
        let claim = f.claim_one("a");
        for report in reports {
            f.store.report(&claim.key, report).unwrap();
        }
        assert_eq!(act(f, Action::Cancel, id).2, State::Stopping, "{reports:?}");
        // What the worker says before it has heard of it does not undo it.
        f.store.report(&claim.key, &Report::Continued).unwrap();
        assert_eq!(state(f, id).0, State::Stopping);
        f.end(&claim.key, Reason::Evicted, None);
        assert_eq!(state(f, id), (State::Cancelled, Reason::Cancelled), "{reports:?}");
    }
    // The worker dies before it hears of it.
    let id = f.plain();
    f.claim_one("a");
    act(f, Action::Cancel, id);
    f.pass(LEASE_MS);
    assert_eq!(state(f, id), (State::Cancelled, Reason::Cancelled));
}

pub(crate) fn a_key_submits_once(f: &Fixture) {
    let mut job = harrier_jobs::queue::NewJob::default();
    job.spec.command = vec!["true".to_owned()];
    job.array = Some((1, 3));
    let first = f.store.submit("ann", Some("k"), std::slice::from_ref(&job)).unwrap();
    assert_eq!(first.len(), 3);
    assert_eq!(f.store.submit("ann", Some("k"), std::slice::from_ref(&job)).unwrap(), first);
    assert_ne!(f.store.submit("ben", Some("k"), std::slice::from_ref(&job)).unwrap(), first);
    assert_ne!(f.store.submit("ann", Some("l"), std::slice::from_ref(&job)).unwrap(), first);
    // One that makes no sense leaves nothing behind.
    let before = f.store.jobs(&Default::default()).unwrap().len();
    let wrong = harrier_jobs::queue::NewJob::default();
    assert!(matches!(f.store.submit("ann", None, &[job, wrong]), Err(StoreError::Invalid(_))));
    assert_eq!(f.store.jobs(&Default::default()).unwrap().len(), before);
}

pub(crate) fn an_array_has_an_index_for_each_job(f: &Fixture) {
    let mut job = harrier_jobs::queue::NewJob::default();
    job.spec.command = vec!["true".to_owned()];
    job.array = Some((5, 7));
    let ids = f.store.submit("ann", None, &[job]).unwrap();
    let places: Vec<(JobId, u64)> = f
        .store
        .jobs(&Default::default())
        .unwrap()
        .iter()
        .map(|job| job.array.map(|array| (array.first, array.index)).unwrap())
        .collect();
    assert_eq!(places, [(ids[0], 5), (ids[0], 6), (ids[0], 7)]);
}

fn output(f: &Fixture, job: JobId, epoch: Option<u64>, offset: u64) -> (Vec<u8>, bool) {
    let query = OutputQuery { job, epoch, stderr: false, offset, limit: 1 << 20 };
    let piece = f.store.read_output(&query).unwrap();
    (piece.bytes, piece.complete)
}

fn whole_output(f: &Fixture, job: JobId, epoch: Option<u64>) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let (bytes, _) = output(f, job, epoch, all.len() as u64);
        if bytes.is_empty() {
            return all;
        }
        all.extend(bytes);
    }
}

fn checkpoint(number: u32, output: u64, work_ms: u64) -> Report {
    Report::Checkpointed(Checkpoint {
        epoch: 0,
        number,
        place: "/somewhere".to_owned(),
        host: Some("a".to_owned()),
        size_bytes: 10,
        output: [output, 0],
        work_ms,
        at_ms: 0,
        cpu_model: None,
    })
}

pub(crate) fn a_checkpoint_goes_only_to_hosts_that_offer_its_processor(f: &Fixture) {
    f.host("old", |_| {});
    f.host("new", |ad| ad.cpu_models.push("v3".to_owned()));
    let id = f.plain();
    let first = f.claim_one("new");
    f.start(&first.key);
    let Report::Checkpointed(taken) = checkpoint(1, 0, 100) else { panic!() };
    let taken = Checkpoint { cpu_model: Some("v3".to_owned()), ..taken };
    f.store.report(&first.key, &Report::Checkpointed(taken.clone())).unwrap();
    f.end(&first.key, Reason::Evicted, None);
    assert_eq!(f.store.job(id).unwrap().checkpoint_cpu_model.as_deref(), Some("v3"));
    assert!(f.claim("old", 1).is_empty(), "it could not restore it");
    let why = harrier_jobs::store::why(f.store.as_ref(), id, 0).unwrap();
    let old = why.hosts.iter().find(|host| host.host == "old").unwrap();
    assert!(!old.suits && old.reasons[0].contains("its checkpoint needs cpu model 'v3'"), "{old:?}");
    let second = f.claim_one("new");
    assert_eq!(second.checkpoints, [Checkpoint { epoch: 1, at_ms: second.checkpoints[0].at_ms, ..taken }]);
    // One that begins anew may go anywhere.
    act(f, Action::Requeue, id);
    f.end(&second.key, Reason::Requeued, None);
    assert!(f.claim_one("old").checkpoints.is_empty());
}

pub(crate) fn output_goes_on_at_a_checkpoint_and_nothing_is_doubled(f: &Fixture) {
    f.host("a", |_| {});
    let id = f.plain();
    assert_eq!(output(f, id, None, 0), (Vec::new(), false));
    let first = f.claim_one("a");
    f.start(&first.key);
    let write =
        |key: &LeaseKey, offset, bytes: &[u8]| f.store.write_output(key, Stream::Stdout, offset, bytes);
    write(&first.key, 0, b"0123456789").unwrap();
    write(&first.key, 5, b"56789abc").unwrap();
    write(&first.key, 0, b"01").unwrap();
    assert!(write(&first.key, 14, b"hole").is_err());
    assert_eq!(output(f, id, None, 0), (b"0123456789abc".to_vec(), false));
    // Bytes after the checkpoint belong to work that is done again.
    f.store.report(&first.key, &checkpoint(1, 10, 500)).unwrap();
    f.end(&first.key, Reason::Evicted, None);
    let second = f.claim_one("a");
    assert_eq!(second.checkpoints.len(), 1);
    let started = Report::Started { engine: None, checkpoint: Some((1, 1)) };
    f.store.report(&second.key, &started).unwrap();
    write(&second.key, 0, b"ABCDEF").unwrap();
    assert_eq!(whole_output(f, id, None), b"0123456789ABCDEF");
    assert_eq!(whole_output(f, id, Some(1)), b"0123456789abc");
    assert_eq!(output(f, id, None, 12), (b"CDEF".to_vec(), false));
    f.end(&second.key, Reason::Exited, Some(0));
    assert_eq!(output(f, id, None, 16), (Vec::new(), true));
    assert!(matches!(
        f.store.read_output(&OutputQuery { job: id, epoch: Some(9), stderr: false, offset: 0, limit: 1 }),
        Err(StoreError::NoAttempt(..))
    ));
}

pub(crate) fn a_bad_checkpoint_is_not_offered_again(f: &Fixture) {
    f.host("a", |_| {});
    let id = f.plain();
    let first = f.claim_one("a");
    f.start(&first.key);
    f.store.report(&first.key, &checkpoint(1, 0, 100)).unwrap();
    f.store.report(&first.key, &checkpoint(2, 0, 200)).unwrap();
    f.end(&first.key, Reason::Evicted, None);
    let numbers = |claim: &harrier_jobs::store::Claim| -> Vec<u32> {
        claim.checkpoints.iter().map(|checkpoint| checkpoint.number).collect()
    };
    let second = f.claim_one("a");
    assert_eq!(numbers(&second), [2, 1], "the latest first");
    let bad = Report::BadCheckpoint { epoch: 1, number: 2, detail: "torn".to_owned() };
    f.store.report(&second.key, &bad).unwrap();
    f.end(&second.key, Reason::Vacated, None);
    let third = f.claim_one("a");
    assert_eq!(numbers(&third), [1]);
    // Starting anew forgets them all.
    act(f, Action::Requeue, id);
    f.end(&third.key, Reason::Requeued, None);
    assert!(f.claim_one("a").checkpoints.is_empty());
}

pub(crate) fn checkpoints_come_in_pieces_and_only_from_who_has_the_job(f: &Fixture) {
    f.host("a", |_| {});
    f.plain();
    let first = f.claim_one("a");
    f.start(&first.key);
    let piece = |offset| CheckpointPiece { number: 1, file: "memory".to_owned(), offset, length: 1 << 20 };
    let Report::Checkpointed(told) = checkpoint(1, 0, 500) else { panic!() };
    let told = Report::Checkpointed(Checkpoint { host: None, ..told });
    assert!(f.store.report(&first.key, &told).is_err(), "nothing of it has come");
    f.store.write_checkpoint(&first.key, &piece(0), b"begin").unwrap();
    f.store.write_checkpoint(&first.key, &piece((1 << 20) - 3), b"end").unwrap();
    for (file, offset) in [("../memory", 0), (".x", 0), ("memory", (1 << 20) - 2), ("memory", u64::MAX)] {
        let bad = CheckpointPiece { file: file.to_owned(), ..piece(offset) };
        assert!(matches!(f.store.write_checkpoint(&first.key, &bad, b"end"), Err(StoreError::Invalid(_))));
    }
    assert_eq!(
        f.store.checkpoint_files(&first.key, 1, 1).unwrap(),
        [],
        "it is not complete before it is told"
    );
    f.store.report(&first.key, &told).unwrap();
    f.end(&first.key, Reason::Vacated, None);
    let fenced = f.store.write_checkpoint(&first.key, &piece(0), b"late");
    assert!(matches!(fenced, Err(StoreError::Fenced(_))), "{fenced:?}");

    let second = f.claim_one("a");
    let offered: Vec<_> = second.checkpoints.iter().map(|it| (it.epoch, it.number, it.work_ms)).collect();
    assert_eq!(offered, [(1, 1, 500)]);
    let files = f.store.checkpoint_files(&second.key, 1, 1).unwrap();
    assert_eq!(files, [CheckpointFile { name: "memory".to_owned(), length: 1 << 20 }]);
    let mut whole = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        let (key, file) = (second.key.clone(), "memory".to_owned());
        let query = CheckpointQuery { key, epoch: 1, number: 1, file, offset, limit: 1 << 16 };
        let data = f.store.read_checkpoint(&query).unwrap();
        if data.bytes.is_empty() {
            assert_eq!(data.offset, 1 << 20);
            break;
        }
        let at = data.offset as usize;
        whole[at..at + data.bytes.len()].copy_from_slice(&data.bytes);
        offset = data.offset + data.bytes.len() as u64;
    }
    assert!(whole.starts_with(b"begin\0") && whole.ends_with(b"\0end"));
    assert!(whole[5..(1 << 20) - 3].iter().all(|byte| *byte == 0));
    let other = CheckpointQuery {
        key: first.key.clone(),
        epoch: 1,
        number: 1,
        file: "memory".to_owned(),
        offset: 0,
        limit: 1,
    };
    assert!(matches!(f.store.read_checkpoint(&other), Err(StoreError::Fenced(_))));
    // What is begun and never told of goes with the job.
    f.store.write_checkpoint(&second.key, &piece(0), b"begun").unwrap();
    f.end(&second.key, Reason::Exited, Some(0));
    assert!(f.store.checkpoint_files(&second.key, 1, 1).is_err(), "the lease is over");
}

/// A file of a test, and what it is.
fn file(text: &str) -> (tempfile::NamedTempFile, FileFacts) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let facts = harrier_jobs::files::facts(file.path()).unwrap();
    (file, facts)
}

pub(crate) fn files_are_there_before_their_job_and_after_its_end(f: &Fixture) {
    f.host("a", |_| {});
    let (source, facts) = file("what it is given");
    let mut job = NewJob::default();
    job.spec.command = vec!["true".to_owned()];
    job.spec.inputs = vec![InputFile { host: "/x".into(), guest: "/x".into(), facts: Some(facts) }];
    let refused = f.store.submit("ann", None, std::slice::from_ref(&job));
    assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
    upload(f.store.as_ref(), source.path(), &facts).unwrap();
    upload(f.store.as_ref(), source.path(), &facts).unwrap();
    let id = f.store.submit("ann", None, &[job]).unwrap()[0];
    let claim = f.claim_one("a");
    assert_eq!(claim.job.spec.inputs[0].facts, Some(facts));
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("here");
    download(f.store.as_ref(), &facts, &place).unwrap();
    assert_eq!(std::fs::read_to_string(&place).unwrap(), "what it is given");

    f.start(&claim.key);
    let (source, facts) = file("what it leaves");
    let unknown = download(f.store.as_ref(), &facts, &place);
    assert!(matches!(unknown, Err(StoreError::Invalid(_))), "{unknown:?}");
    assert_eq!(std::fs::read_to_string(&place).unwrap(), "what it is given", "it stays as it is");
    upload(f.store.as_ref(), source.path(), &facts).unwrap();
    let left = vec![StoredFile { guest: "/y".into(), facts }];
    f.store.report(&claim.key, &Report::Files(left.clone())).unwrap();
    f.store.report(&claim.key, &Report::Progress("half\u{1b}[2J done".into())).unwrap();
    assert_eq!(f.store.job(id).unwrap().progress.as_deref(), Some("half[2J done"));
    f.end(&claim.key, Reason::Exited, Some(0));
    assert_eq!(f.store.attempts(id).unwrap()[0].files, left);
    let late = f.store.report(&claim.key, &Report::Files(Vec::new()));
    assert!(matches!(late, Err(StoreError::Fenced(_))), "{late:?}");
    assert_eq!(f.store.attempts(id).unwrap()[0].files, left);
}

pub(crate) fn a_job_that_saves_its_state_is_given_it_again(f: &Fixture) {
    f.host("a", |_| {});
    let id = f.plain();
    let (source, facts) = file("state");
    upload(f.store.as_ref(), source.path(), &facts).unwrap();
    let saved = vec![StoredFile { guest: "/state".into(), facts }];
    for _ in 0..7 {
        let claim = f.claim_one("a");
        f.start(&claim.key);
        f.pass(1000);
        f.store.report(&claim.key, &Report::Files(saved.clone())).unwrap();
        f.end(&claim.key, Reason::SelfCheckpointed, Some(85));
        assert_eq!(state(f, id), (State::Queued, Reason::SelfCheckpointed));
        f.pass(1000);
    }
    // A failure of the system loses nothing of it; a new beginning does.
    let claim = f.claim_one("a");
    assert_eq!(claim.job.saved, saved);
    f.end(&claim.key, Reason::MachineFailed, None);
    f.pass(10_000);
    let claim = f.claim_one("a");
    assert_eq!((claim.job.failures, &claim.job.saved), (1, &saved));
    let times = f.store.attempts(id).unwrap()[0].times;
    assert_eq!((times.committed_ms, times.lost_ms), (1000, 0));
    act(f, Action::Requeue, id);
    f.end(&claim.key, Reason::Requeued, None);
    assert_eq!(f.claim_one("a").job.saved, []);
}

pub(crate) fn time_is_accounted_for(f: &Fixture) {
    f.host("a", |_| {});
    let id = f.plain();
    let first = f.claim_one("a");
    f.pass(1000);
    f.start(&first.key);
    f.pass(10_000);
    f.store.report(&first.key, &checkpoint(1, 0, 8_000)).unwrap();
    let times = Times { suspended_ms: 2_000, ..Times::default() };
    let end = Ended { reason: Reason::Evicted, detail: None, exit_code: None, times };
    f.store.report(&first.key, &Report::Ended(end)).unwrap();
    let second = f.claim_one("a");
    f.store.report(&second.key, &Report::Started { engine: None, checkpoint: Some((1, 1)) }).unwrap();
    f.pass(5_000);
    f.end(&second.key, Reason::Exited, Some(0));
    let attempts = f.store.attempts(id).unwrap();
    let times = attempts[0].times;
    assert_eq!(
        (times.allocated_ms, times.suspended_ms, times.committed_ms, times.lost_ms),
        (11_000, 2_000, 8_000, 0)
    );
    assert_eq!((attempts[1].parent, attempts[1].times.committed_ms), (Some(1), 5_000));
    let stats = f.store.stats().unwrap();
    assert_eq!(stats.times.allocated_ms, 16_000);
    assert_eq!(stats.goodput(), Some(13.0 / 16.0));
    // A job that is lost without a checkpoint has kept nothing.
    f.plain();
    let lost = f.claim_one("a");
    f.start(&lost.key);
    f.pass(LEASE_MS);
    assert_eq!(f.store.stats().unwrap().times.lost_ms, LEASE_MS);
}

pub(crate) fn events_tell_everything_in_order(f: &Fixture) {
    f.host("a", |_| {});
    let id = f.plain();
    let other = f.plain();
    let claim = f.claim_one("a");
    f.start(&claim.key);
    f.end(&claim.key, Reason::Exited, Some(0));
    let of = |job, after_seq| f.store.events(&EventQuery { job, after_seq, limit: None }).unwrap();
    let states: Vec<State> = of(Some(id), 0).iter().map(|event| event.state).collect();
    assert_eq!(states, [State::Queued, State::Starting, State::Running, State::Succeeded]);
    let all = of(None, 0);
    assert!(all.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    assert_eq!(all.len(), 5);
    assert_eq!(of(None, all[2].seq).len(), 2);
    assert_eq!(of(Some(other), 0).len(), 1);
}

pub(crate) fn what_does_not_exist_is_refused(f: &Fixture) {
    assert_eq!(f.store.job(9), Err(StoreError::NoJob(9)));
    assert_eq!(f.store.attempts(9), Err(StoreError::NoJob(9)));
    assert_eq!(f.store.act(&Action::Cancel, &[9]), Err(StoreError::NoJob(9)));
    // All or none: the good one is left as it was.
    let id = f.plain();
    assert_eq!(f.store.act(&Action::Cancel, &[id, 9]), Err(StoreError::NoJob(9)));
    assert_eq!(state(f, id).0, State::Queued);
    let stranger = ClaimRequest { host: "x".to_owned(), instance: "x".to_owned(), count: 1, free: free() };
    assert_eq!(f.store.claim(&stranger), Err(StoreError::NoHost("x".to_owned())));
    f.host("a", |_| {});
    let twin = ClaimRequest { host: "a".to_owned(), instance: "other".to_owned(), count: 1, free: free() };
    assert!(matches!(f.store.claim(&twin), Err(StoreError::Invalid(_))), "two workers of one name");
    let none = Dependency { job: 99, kind: DependencyKind::End };
    let mut job = harrier_jobs::queue::NewJob { after: vec![none], ..Default::default() };
    job.spec.command = vec!["true".to_owned()];
    assert_eq!(f.store.submit("ann", None, &[job]), Err(StoreError::NoJob(99)));
}

pub(crate) fn thousands_of_jobs_are_claimed_by_several_workers_once_each(f: &Fixture) {
    const JOBS: u64 = 500;
    let mut job = harrier_jobs::queue::NewJob::default();
    job.spec.command = vec!["true".to_owned()];
    job.array = Some((1, JOBS));
    f.store.submit("ann", None, &[job]).unwrap();
    let seen = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for host in ["a", "b", "c", "d"] {
            f.host(host, |_| {});
            let seen = &seen;
            scope.spawn(move || {
                let large = harrier_jobs::queue::Free { slots: 64, cpus: 64, memory_bytes: 1 << 40 };
                let request = ClaimRequest {
                    host: host.to_owned(),
                    instance: format!("{host}-1"),
                    count: 50,
                    free: large,
                };
                loop {
                    let claims = f.store.claim(&request).unwrap();
                    if claims.is_empty() {
                        break;
                    }
                    for claim in claims {
                        f.end(&claim.key, Reason::Exited, Some(0));
                        seen.lock().unwrap().push(claim.key.job);
                    }
                }
            });
        }
    });
    let seen = seen.into_inner().unwrap();
    let distinct: HashSet<JobId> = seen.iter().copied().collect();
    assert_eq!((seen.len() as u64, distinct.len() as u64), (JOBS, JOBS));
    let stats = f.store.stats().unwrap();
    assert_eq!(stats.states, [(State::Succeeded, JOBS)]);
}
