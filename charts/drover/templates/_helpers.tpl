{{/* The chart's name, at most 63 characters as Kubernetes wants them. */}}
{{- define "drover.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The prefix of all objects' names; short enough that "-members" and an ordinal still fit. */}}
{{- define "drover.fullname" -}}
{{- $name := include "drover.name" . -}}
{{- $full := printf "%s-%s" .Release.Name $name -}}
{{- if contains $name .Release.Name -}}{{- $full = .Release.Name -}}{{- end -}}
{{- default $full .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "drover.selector" -}}
app.kubernetes.io/name: {{ include "drover.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: controller
{{- end -}}

{{- define "drover.labels" -}}
{{ include "drover.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "drover.clusterId" -}}
{{- default (include "drover.fullname" .) .Values.clusterId -}}
{{- end -}}

{{/* Where a member is reached, HOST:PORT. Takes a list: the root, the member's number from 1. */}}
{{- define "drover.address" -}}
{{- $root := index . 0 -}}
{{- $member := index . 1 -}}
{{- $full := include "drover.fullname" $root -}}
{{- if $root.Values.addresses -}}
{{- index $root.Values.addresses (sub $member 1 | int) -}}
{{- else -}}
{{- printf "%s-%d.%s-members.%s.svc:%d" $full (int $member) $full $root.Release.Namespace (int $root.Values.port) -}}
{{- end -}}
{{- end -}}

{{/* What the schema cannot say. */}}
{{- define "drover.check" -}}
{{- $given := len .Values.addresses -}}
{{- if and $given (ne $given (int .Values.members)) -}}
{{- fail (printf "addresses: %d given; none, or one for each of the %d members is accepted" $given (int .Values.members)) -}}
{{- end -}}
{{- end -}}
