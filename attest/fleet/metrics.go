package fleet

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"sekisho/attest"
)

// maxScrapes bounds the connections of those who read metrics.
const maxScrapes = 16

// metrics are what a verifier counts. They name no device and no user.
type metrics struct {
	registry *prometheus.Registry
	results  *prometheus.CounterVec // by status and reason
	refused  *prometheus.CounterVec // requests that are no appraisal, by request and reason
	took     prometheus.Histogram   // appraisals, with store and archive
	enrolled prometheus.Counter     // enrolments
	told     *prometheus.CounterVec // who was told to come back, by why
}

func newMetrics(s *Service) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		results:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sekisho_verifier_results_total", Help: "Appraisals by status and reason."}, []string{"status", "reason"}),
		refused:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sekisho_verifier_refusals_total", Help: "Requests other than evidence that were refused, by reason."}, []string{"request", "reason"}),
		told:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sekisho_verifier_busy_total", Help: "Answers that tell a laptop when to come back, by why."}, []string{"why"}),
		enrolled: prometheus.NewCounter(prometheus.CounterOpts{Name: "sekisho_verifier_enrolments_total", Help: "Devices enrolled."}),
		took: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "sekisho_verifier_appraisal_seconds", Help: "From the turn of a piece of evidence to its result, report stored.",
			Buckets: []float64{.002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10}}),
	}
	m.registry.MustRegister(m.results, m.refused, m.took, m.enrolled, m.told)
	gauge := func(name, help string, f func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "sekisho_verifier_" + name, Help: help}, f))
	}
	gauge("ramp_pace", "Laptops a second that are let in while more come.", func() float64 { rate, _, _ := s.ramp.state(); return rate })
	gauge("ramp_ahead_seconds", "How far ahead places are given.", func() float64 { _, ahead, _ := s.ramp.state(); return ahead.Seconds() })
	gauge("evidence_waiting", "Evidence that waits or is judged now.", func() float64 { _, _, n := s.ramp.state(); return float64(n) })
	gauge("suspensions", "Suspensions, and devices that were retired.", func() float64 { return float64(len(s.Suspensions())) })
	gauge("gateways", "Gateways that hear of revocations.", func() float64 {
		s.shared.revoked.mu.Lock()
		defer s.shared.revoked.mu.Unlock()
		return float64(s.shared.revoked.streams)
	})
	if s.Reports != nil {
		gauge("archive_bytes", "Reports on disk.", func() float64 { return float64(s.Reports.Size()) })
	}
	if s.Audit != nil {
		gauge("log_leaves", "Reports in the log.", func() float64 { return float64(s.Audit.Size()) })
	}
	return m
}

// result counts an appraisal that began at a time.
func (m *metrics) result(r attest.Result, took time.Duration) {
	m.results.WithLabelValues(r.Status.String(), r.Reason.String()).Inc()
	m.took.Observe(took.Seconds())
}

// ServeMetrics serves the metrics of s in Prometheus' text format at /metrics
// of address, until ctx ends. An address without a host is on loopback; an
// empty one serves nothing.
func ServeMetrics(ctx context.Context, address string, s *Service, log *slog.Logger) error {
	if address == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	return serve(ctx, netutil.LimitListener(l, maxScrapes), s.MetricsHandler(), log)
}

// MetricsHandler answers GET /metrics and nothing else.
func (s *Service) MetricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{}))
	return mux
}
