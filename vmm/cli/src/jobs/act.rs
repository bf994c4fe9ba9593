//! What users do to jobs.

use harrier_jobs::queue::{JobId, State};
use harrier_jobs::store::{Action, JobFilter};

use super::flags::{JobsFlags, PrioFlags, QueuePlace, VacateFlags};
use super::{ids, place, print, print_json};
use crate::exit::{Failure, HARRIER_FAILED};
use crate::flags::ResumeFlags;

/// Does something to jobs; one for which it makes no sense is a failure, which does not keep it from the others.
pub(super) fn act(action: &Action, flags: &JobsFlags) -> Result<u8, Failure> {
    act_on(action, &flags.place, &ids::parse(&flags.jobs)?, flags.json)
}

pub(crate) fn resume(flags: ResumeFlags) -> Result<u8, Failure> {
    act_on(&Action::Resume, &flags.place, &ids::parse(&flags.targets)?, flags.json)
}

pub(super) fn prio(flags: &PrioFlags) -> Result<u8, Failure> {
    let ids = ids::parse(std::slice::from_ref(&flags.jobs))?;
    act_on(&Action::Priority(flags.priority), &flags.place, &ids, flags.json)
}

pub(super) fn vacate(flags: &VacateFlags) -> Result<u8, Failure> {
    let mut found = Vec::new();
    for target in &flags.targets {
        if ids::is_job(target) {
            found.extend(ids::parse(std::slice::from_ref(target))?);
            continue;
        }
        let store = place::open(&flags.place)?;
        if !store.hosts()?.iter().any(|host| host.ad.host == *target) {
            return Err(Failure::new(format!("there is no host '{target}': 'harrier hosts' lists them")));
        }
        let filter = JobFilter {
            host: Some(target.clone()),
            states: Some(State::ALL.iter().copied().filter(|state| state.is_leased()).collect()),
            ..JobFilter::default()
        };
        found.extend(store.jobs(&filter)?.iter().map(|job| job.id));
    }
    act_on(&Action::Vacate, &flags.place, &found, flags.json)
}

fn act_on(action: &Action, queue: &QueuePlace, ids: &[JobId], json: bool) -> Result<u8, Failure> {
    let results = place::open(queue)?.act(action, ids)?;
    let code = if results.iter().any(|result| result.refused) { HARRIER_FAILED } else { 0 };
    if json {
        print_json(&results)?;
        return Ok(code);
    }
    for result in &results {
        if result.refused {
            crate::print_failure(&Failure::new(format!("job {} {}", result.job, result.message)));
        } else {
            print(&format!("job {}: {}\n", result.job, result.message))?;
        }
    }
    Ok(code)
}
