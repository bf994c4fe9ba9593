//! What every store has to do, said once and tried on each: the SQLite file, and the same behind a coordinator on a
//! unix socket and on TCP.

mod stores;
mod suite;

use harrier_jobs::store::SqliteStore;
use stores::{Place, open};

/// Of a queue in a folder: what a process that died in the middle has left goes when the next one works on it.
#[test]
fn checkpoints_of_jobs_that_have_ended_go_although_who_recorded_the_end_has_died() {
    let folder = tempfile::tempdir().unwrap();
    let queue = folder.path().join("queue");
    let fixture = stores::open_in(&queue);
    fixture.host("a", |_| {});
    let (over, running) = (fixture.plain(), fixture.plain());
    let claims = fixture.claim("a", 2);
    let of = |job: u64| queue.join("checkpoints").join(job.to_string()).join("1.1");
    // As they lay before the end was recorded, and still do after a kill.
    let put = |job| {
        std::fs::create_dir_all(of(job)).unwrap();
        std::fs::write(of(job).join("state"), "x").unwrap();
    };
    put(running);
    let key = &claims.iter().find(|claim| claim.key.job == over).unwrap().key;
    fixture.end(key, harrier_jobs::queue::Reason::Exited, Some(0));
    for how in ["served", "worked on", "told again"] {
        put(over);
        match how {
            "served" => drop(SqliteStore::open_with_lease(&queue, stores::LEASE_MS).unwrap()),
            "worked on" => drop(SqliteStore::open_for_worker(&queue, stores::LEASE_MS).unwrap()),
            _ => {
                let told =
                    fixture.store.report(key, &stores::ended(harrier_jobs::queue::Reason::Exited, Some(0)));
                assert!(told.is_err(), "it counts once");
            }
        }
        assert!(!of(over).parent().unwrap().exists(), "{how}");
        assert!(of(running).join("state").exists(), "{how}");
    }
}

macro_rules! on_every_store {
    ($($name:ident,)*) => {
        mod sqlite {
            $(#[test] fn $name() { super::suite::$name(&super::open(super::Place::File)); })*
        }
        mod coordinator_on_a_socket {
            $(#[test] fn $name() { super::suite::$name(&super::open(super::Place::Unix)); })*
        }
        mod coordinator_on_tcp {
            $(#[test] fn $name() { super::suite::$name(&super::open(super::Place::Tcp)); })*
        }
    };
}

on_every_store! {
    a_job_is_claimed_once_and_ends_once,
    a_lease_that_is_not_renewed_is_given_to_another_and_its_holder_is_fenced,
    an_end_that_is_told_twice_counts_once,
    priority_goes_before_age,
    users_share_and_what_was_used_is_forgotten,
    the_oldest_job_is_never_passed_over_for_ever,
    hosts_get_only_what_suits_them_and_fits,
    a_job_is_left_to_the_host_that_it_prefers_for_a_while,
    a_failed_command_is_retried_after_a_growing_wait,
    the_system_fails_a_job_so_often_before_it_is_held,
    jobs_wait_for_others,
    actions_say_the_same_when_they_are_said_twice,
    wishes_reach_the_worker_and_decide_where_the_job_goes,
    cancelling_works_in_every_state,
    a_key_submits_once,
    an_array_has_an_index_for_each_job,
    output_goes_on_at_a_checkpoint_and_nothing_is_doubled,
    a_bad_checkpoint_is_not_offered_again,
    a_checkpoint_goes_only_to_hosts_that_offer_its_processor,
    checkpoints_come_in_pieces_and_only_from_who_has_the_job,
    files_are_there_before_their_job_and_after_its_end,
    a_job_that_saves_its_state_is_given_it_again,
    time_is_accounted_for,
    events_tell_everything_in_order,
    what_does_not_exist_is_refused,
    thousands_of_jobs_are_claimed_by_several_workers_once_each,
}
