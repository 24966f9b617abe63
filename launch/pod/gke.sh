#!/usr/bin/env bash
# From nothing to a running training job on TPUs in GKE (docs/pods.md explains every step):
#
#   bash launch/pod/gke.sh COMMAND --flag=value ... [--dry_run] [-- TRAIN FLAGS]
#
#   cluster   creates a cluster, installs JobSet in it, and makes kubectl use it
#             --cluster=NAME --location=REGION --project=PROJECT [--jobset_version=v0.12.0]
#   nodes     creates the node pool of a slice
#             --cluster= --location= --project= --name= --zone=ZONE --accelerator=v5e --topology=8x8 [--spot | --reservation=NAME]
#   storage   lets jobs use a bucket, or makes a shared volume
#             --bucket=BUCKET --project= --project_number=NUMBER | --volume=NAME [--size=1Ti] [--storage_class=standard-rwx]
#   image     builds the image from the committed source tree and pushes it  --image=REGISTRY/NAME:TAG [--extras=tpu]
#   manifest  prints the JobSet that launch creates
#   launch    creates it  --name= --image= --accelerator= --topology= --workdir=DIR  --bucket=BUCKET | --volume=NAME
#             [--mount=/mnt/pod] [--restarts=20] [--grace=600] -- --config=FILE ...
#   status    the JobSet and its pods  --name=
#   watch     follows the log of a host  --name= [--worker=0] [--lines=50]
#   stop      deletes the JobSet: its pods save and end. Launched again, it goes on  --name= [--grace=600]
#   delete_nodes, delete_cluster        --cluster= --location= --project= [--name=] [--yes]
#
# All that speak to kubectl also take --namespace= (default), --service_account= (datamux) and --context= (kubectl's own).
# --dry_run prints the commands that would be run and runs nothing.

set -euo pipefail
# shellcheck source=launch/pod/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cluster=
location=
project=
project_number=
jobset_version=v0.12.0
name=
zone=
accelerator=
topology=
spot=
reservation=
bucket=
volume=
size=1Ti
storage_class=standard-rwx
image=
extras=tpu
workdir=
mount=/mnt/pod
restarts=20
grace=600
worker=0
lines=50
namespace=default
service_account=datamux
context=
yes=

kube() { run kubectl ${context:+"--context=$context"} "--namespace=$namespace" "$@"; }

# Creates what a manifest on stdin describes; with --dry_run shows command and manifest.
kube_create() {
  if [ -n "$dry_run" ]; then
    quoted kubectl ${context:+"--context=$context"} "--namespace=$namespace" create -f -
    printf " <<'END'\n"
    cat
    printf 'END\n'
  else
    kubectl ${context:+"--context=$context"} "--namespace=$namespace" create -f -
  fi
}

make_cluster() {
  # --addons turns off what it does not name, so the defaults are named as well.
  run gcloud container clusters create "$cluster" "--project=$project" "--location=$location" --release-channel=regular \
    --machine-type=e2-standard-4 --num-nodes=1 "--workload-pool=$project.svc.id.goog" \
    --addons=HttpLoadBalancing,HorizontalPodAutoscaling,GcePersistentDiskCsiDriver,GcsFuseCsiDriver,GcpFilestoreCsiDriver
  run gcloud container clusters get-credentials "$cluster" "--project=$project" "--location=$location"
  run kubectl apply --server-side -f "https://github.com/kubernetes-sigs/jobset/releases/download/$jobset_version/manifests.yaml"
  run kubectl wait --namespace=jobset-system --for=condition=Available deployment/jobset-controller-manager --timeout=300s
}

make_nodes() {
  local flags=("--machine-type=$machine" "--num-nodes=$hosts")
  # The topology of a single host follows from its machine type.
  [ "$hosts" -eq 1 ] || flags+=("--tpu-topology=$topology")
  [ -z "$spot" ] || flags+=(--spot)
  [ -z "$reservation" ] || flags+=(--reservation-affinity=specific "--reservation=$reservation")
  run gcloud container node-pools create "$name" "--cluster=$cluster" "--project=$project" "--location=$location" \
    "--node-locations=$zone" "${flags[@]}"
}

make_storage() {
  if [ -n "$bucket" ]; then
    # Another bucket may have made it before.
    if [ -n "$dry_run" ] || ! kube get serviceaccount "$service_account" >/dev/null 2>&1; then
      kube create serviceaccount "$service_account"
    fi
    run gcloud storage buckets add-iam-policy-binding "gs://$bucket" --role=roles/storage.objectUser \
      "--member=principal://iam.googleapis.com/projects/$project_number/locations/global/workloadIdentityPools/$project.svc.id.goog/subject/ns/$namespace/sa/$service_account"
  else
    kube_create <<END
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: $volume
spec:
  accessModes: [ReadWriteMany]
  storageClassName: $storage_class
  resources:
    requests:
      storage: $size
END
  fi
}

make_image() {
  pack_source
  if [ -n "$dry_run" ]; then
    quoted docker build --platform=linux/amd64 -f launch/pod/Dockerfile "--build-arg=EXTRAS=$extras" -t "$image" -
    printf ' <%s\n' "$(quote "$SOURCE")"
  else
    docker build --platform=linux/amd64 -f launch/pod/Dockerfile "--build-arg=EXTRAS=$extras" -t "$image" - <"$SOURCE"
  fi
  run docker push "$image"
}

# A YAML string that Kubernetes, which would expand $(NAME) in arguments, takes word for word.
# shellcheck disable=SC2016
yaml() { sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/\$(/$$(/g' -e 's/.*/"&"/' <<<"$1"; }

manifest() {
  local word
  train_flags "$workdir" "$hosts"
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # All pods on one slice, and no other job on it.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    # No pod of the next start writes while one of the last still saves.
    restartStrategy: BlockingRecreate
    rules:
    - name: refused
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: train
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          # Exit code 2 is bad input: another start would be refused as well.
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [2]
        template:
END
  [ -z "$bucket" ] || cat <<END
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
END
  cat <<END
          spec:
            restartPolicy: Never
            # From TERM to KILL: the time to write a checkpoint. Spot machines give about 15 seconds, whatever stands here.
            terminationGracePeriodSeconds: $grace
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $label
              cloud.google.com/gke-tpu-topology: "$topology"
END
  [ -z "$bucket" ] || echo "            serviceAccountName: $service_account"
  cat <<END
            containers:
            - name: train
              image: $(yaml "$image")
              args:
              - "python"
              - "-m"
              - "launch.train"
END
  for word in "${TRAIN[@]}"; do echo "              - $(yaml "$word")"; done
  cat <<END
              # The TPU driver locks more memory than a container is allowed otherwise.
              securityContext:
                privileged: true
              resources:
                requests:
                  google.com/tpu: $chips_per_host
                limits:
                  google.com/tpu: $chips_per_host
              volumeMounts:
              - name: shared
                mountPath: $(yaml "$mount")
            volumes:
            - name: shared
END
  # Folders are renamed when a checkpoint is complete, and metadata are not cached, which they would be for ever on these
  # machines: each host must see what the others write.
  if [ -n "$bucket" ]; then
    cat <<END
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: $bucket
                  mountOptions: "implicit-dirs,file-system:rename-dir-limit:200000,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
END
  else
    cat <<END
              persistentVolumeClaim:
                claimName: $volume
END
  fi
}

launch() {
  if [ -z "$dry_run" ] && kube get jobset "$name" >/dev/null 2>&1; then
    give_up "There is a JobSet $name already, and it is not started twice. \`status\` shows it; \`stop\` ends it, and launched again it goes on."
  fi
  manifest | kube_create
}

[ $# -gt 0 ] || fail "No command is given. Commands are cluster, nodes, storage, image, manifest, launch, status, watch, stop, delete_nodes and delete_cluster; --help explains them."
command=$1
shift
kubernetes='namespace service_account context'
job='name image accelerator topology workdir bucket volume mount restarts grace'
place='cluster location project'
case $command in
  cluster) parse "$place jobset_version" dry_run "$@" ;;
  nodes) parse "$place name zone accelerator topology reservation" 'spot dry_run' "$@" ;;
  storage) parse "bucket project project_number volume size storage_class $kubernetes" dry_run "$@" ;;
  image) parse 'image extras' dry_run "$@" ;;
  manifest | launch) parse "$job $kubernetes" dry_run "$@" ;;
  status) parse "name $kubernetes" dry_run "$@" ;;
  watch) parse "name worker lines $kubernetes" dry_run "$@" ;;
  stop) parse "name grace $kubernetes" dry_run "$@" ;;
  delete_nodes) parse "$place name" 'yes dry_run' "$@" ;;
  delete_cluster) parse "$place" 'yes dry_run' "$@" ;;
  --help) usage; exit 0 ;;
  *) fail "There is no command $command here. Commands are cluster, nodes, storage, image, manifest, launch, status, watch, stop, delete_nodes and delete_cluster." ;;
esac

case $command in
  cluster | nodes | delete_nodes | delete_cluster) require cluster tpus location us-west4 project my-project ;;
  storage)
    [ -n "$bucket$volume" ] || fail "Neither --bucket nor --volume is given. Give the bucket that jobs use, or the name of a volume to make."
    [ -z "$bucket" ] || require project my-project project_number 123456789012
    ;;
  image) require image us-west4-docker.pkg.dev/my-project/datamux/train:1 ;;
  manifest | launch)
    require name muxbert image us-west4-docker.pkg.dev/my-project/datamux/train:1 accelerator v5e topology 8x8 workdir /mnt/pod/runs/muxbert
    [ -n "$bucket$volume" ] || fail "Neither --bucket nor --volume is given. Give the folder that all hosts share: --bucket=NAME, or --volume=NAME of a volume claim."
    ;;
esac
case $command in
  nodes) require name muxbert zone us-west4-a accelerator v5e topology 8x8 ;;
  delete_nodes | status | watch | stop) require name muxbert ;;
esac
matches name "$DNS_LABEL" "$DNS_RULE"
matches cluster "$DNS_LABEL" "$DNS_RULE"
matches volume "$DNS_LABEL" "$DNS_RULE"
matches namespace "$DNS_LABEL" "$DNS_RULE"
matches service_account "$DNS_LABEL" "$DNS_RULE"
matches storage_class '^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$' "is no storage class. \`kubectl get storageclass\` lists them."
matches location '^[a-z]+-[a-z]+[0-9]+(-[a-z0-9]+)?$' "is no region and no zone. Write it like --location=us-west4."
matches zone "$ZONE" "is no zone. Write it like --zone=us-west4-a."
matches project "$PROJECT" "is no project id. \`gcloud projects list\` shows them."
matches project_number '^[0-9]{6,14}$' "is no project number. \`gcloud projects list\` shows it."
matches jobset_version '^v[0-9]+\.[0-9]+\.[0-9]+$' "is no release of JobSet. Write it like --jobset_version=v0.12.0."
matches bucket "$BUCKET" "is no name of a bucket. Write the name alone, without gs:// and without a folder."
matches size '^[1-9][0-9]*[GT]i$' "is no size. Write it like --size=1Ti."
matches image '^[A-Za-z0-9][-._/:@A-Za-z0-9]*$' "is no name of an image. Write it like --image=us-west4-docker.pkg.dev/my-project/datamux/train:1."
matches extras '^[a-z]+(,[a-z]+)*$' "is no list of extras. Write names from setup.cfg with commas between them, for instance --extras=tpu."
matches reservation '^[a-z][-/a-z0-9]*$' "is no name of a reservation. Write it as the console shows it."
matches restarts '^[0-9]{1,4}$' "is no number of restarts. Write it in digits; 0 for none."
matches worker '^[0-9]{1,4}$' "is no worker. Write its number, from 0."
positive grace lines
absolute mount
absolute workdir
[ -z "$bucket" ] || [ -z "$volume" ] || fail "--bucket and --volume are both given, but one folder is mounted. Give one of them."
[ -z "$spot" ] || [ -z "$reservation" ] || fail "--spot and --reservation exclude each other: machines come from a reservation or from what is left over. Give one of them."
[ -z "$accelerator" ] || gke_slice "$accelerator" "$topology"
case $command in
  manifest | launch)
    check_train_flags
    case $workdir/ in "$mount"/*) ;; *)
      fail "--workdir=$workdir is not on the shared folder --mount=$mount, so every pod would have another one, and lose it. Give a folder below $mount."
      ;;
    esac
    ;;
  *) [ ${#EXTRA[@]} -eq 0 ] || fail "'${EXTRA[0]}' stands after a bare --, but only launch and manifest take flags of launch.train. Leave it out." ;;
esac

case $command in
  cluster) make_cluster ;;
  nodes) make_nodes ;;
  storage) make_storage ;;
  image) make_image ;;
  manifest) manifest ;;
  launch) launch ;;
  status)
    kube get jobset "$name"
    kube get pods -l "jobset.sigs.k8s.io/jobset-name=$name" -o wide
    ;;
  watch)
    kube logs -f -c train "--tail=$lines" \
      -l "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=$worker"
    ;;
  # The pods are gone when this returns, so nothing writes into the workdir any more.
  stop) kube delete jobset "$name" --cascade=foreground --wait=true "--timeout=$((grace + 60))s" ;;
  delete_nodes) run gcloud container node-pools delete "$name" "--cluster=$cluster" "--project=$project" "--location=$location" ${yes:+--quiet} ;;
  delete_cluster) run gcloud container clusters delete "$cluster" "--project=$project" "--location=$location" ${yes:+--quiet} ;;
esac
