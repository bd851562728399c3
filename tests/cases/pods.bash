pod_cases() {
  pod "pod of one container runs it to its end" pods::pod_of_one
}
