//! Which hosts suit a job.

use super::expr::{Expr, Scope, Value};
use super::job::{HostAd, Job};

/// The names that requirements and rank may use; `labels.` stands for all that begin so.
pub(super) const NAMES: &[&str] = &[
    "host",
    "slots",
    "cpus",
    "memory",
    "engine",
    "kvm",
    "cpu_model",
    "version",
    "free_slots",
    "free_cpus",
    "free_memory",
    "labels.",
];

/// What keeps a job from a host for good; nothing if the host suits it.
pub fn unsuitable_for(ad: &HostAd, job: &Job) -> Vec<String> {
    let spec = &job.spec;
    let mut reasons = unsuitable(
        ad,
        &Needs {
            engine: &spec.engine,
            cpu_model: spec.cpu_model.as_deref(),
            checkpoint_cpu_model: job.checkpoint_cpu_model.as_deref(),
            requirements: spec.requirements.as_deref(),
        },
    );
    if spec.cpus > ad.cpus {
        reasons.push(format!("it wants {} cpus, the host gives {} to jobs", spec.cpus, ad.cpus));
    }
    if spec.memory_bytes > ad.memory_bytes {
        let mib = |bytes: u64| bytes >> 20;
        reasons.push(format!(
            "it wants {} MiB of memory, the host gives {} MiB to jobs",
            mib(spec.memory_bytes),
            mib(ad.memory_bytes)
        ));
    }
    reasons
}

/// What a job needs of a host, besides room.
#[derive(Clone, Copy, Debug)]
pub struct Needs<'a> {
    /// auto, or a name.
    pub engine: &'a str,
    /// What its user wants.
    pub cpu_model: Option<&'a str>,
    /// What its latest checkpoint was taken on.
    pub checkpoint_cpu_model: Option<&'a str>,
    /// An expression.
    pub requirements: Option<&'a str>,
}

/// What keeps a job with these needs from a host for good; nothing if the host suits it.
pub fn unsuitable(ad: &HostAd, needs: &Needs<'_>) -> Vec<String> {
    let Needs { engine, cpu_model, checkpoint_cpu_model, requirements } = *needs;
    let mut reasons = Vec::new();
    if engine != "auto" && !ad.engines.iter().any(|offered| offered == engine) {
        reasons.push(format!("engine '{engine}' is not one of {}", ad.engines.join(", ")));
    }
    if let Some(model) = cpu_model
        && !ad.cpu_models.iter().any(|offered| offered == model)
    {
        reasons.push(format!("cpu model '{model}' is not one of {}", ad.cpu_models.join(", ")));
    }
    if let Some(model) = checkpoint_cpu_model
        && !ad.cpu_models.iter().any(|offered| offered == model)
    {
        reasons.push(format!(
            "its checkpoint needs cpu model '{model}', which is not one of {} ('harrier requeue' begins anew)",
            ad.cpu_models.join(", ")
        ));
    }
    if let Some(text) = requirements {
        match Expr::parse(text) {
            Ok(expr) if expr.is_true(&AdScope(ad)) => {}
            Ok(expr) => reasons.extend(expr.unmet(&AdScope(ad))),
            Err(err) => reasons.push(format!("its requirements cannot be read: {err}")),
        }
    }
    reasons
}

/// The names that requirements and rank may use.
pub struct AdScope<'a>(pub &'a HostAd);

impl Scope for AdScope<'_> {
    fn value(&self, name: &str) -> Value {
        let ad = self.0;
        match name {
            "host" => Value::Text(ad.host.clone()),
            "slots" => Value::Number(f64::from(ad.slots)),
            "cpus" => Value::Number(f64::from(ad.cpus)),
            "memory" => Value::Number(ad.memory_bytes as f64),
            "engine" => ad.engines.first().cloned().map_or(Value::Undefined, Value::Text),
            "kvm" => Value::Bool(ad.engines.iter().any(|engine| engine == "kvm")),
            // The best of the models that are the same everywhere.
            "cpu_model" => {
                let best = ad.cpu_models.iter().filter(|model| !model.starts_with("host")).max();
                best.cloned().map_or(Value::Undefined, Value::Text)
            }
            "version" => Value::Text(ad.version.clone()),
            "free_slots" => Value::Number(f64::from(ad.free.slots)),
            "free_cpus" => Value::Number(f64::from(ad.free.cpus)),
            "free_memory" => Value::Number(ad.free.memory_bytes as f64),
            _ => name
                .strip_prefix("labels.")
                .and_then(|label| ad.labels.get(label))
                .cloned()
                .map_or(Value::Undefined, Value::Text),
        }
    }
}
