package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// maxScrapes bounds the connections of those who read metrics, and scrapeTime
// each of their requests.
const (
	maxScrapes = 16
	scrapeTime = 10 * time.Second
)

// metrics are what a gateway counts. They name no device.
type metrics struct {
	registry *prometheus.Registry
	admitted prometheus.Counter
	refused  *prometheus.CounterVec // by HTTP status
}

func newMetrics(s *Server) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		admitted: prometheus.NewCounter(prometheus.CounterOpts{Name: "sekisho_gateway_admissions_total", Help: "Sessions that were admitted."}),
		refused:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "sekisho_gateway_refusals_total", Help: "Requests that were refused, by HTTP status: 403 credential or revocation, 503 no room or no word of revocations."}, []string{"status"}),
	}
	m.registry.MustRegister(m.admitted, m.refused)
	value := func(name, help string, f func(Status) float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "sekisho_gateway_" + name, Help: help}, func() float64 { return f(s.Status()) }))
	}
	value("sessions", "Laptops with a session.", func(st Status) float64 { return float64(len(st.Sessions)) })
	value("leases", "Inner addresses that were given.", func(st Status) float64 { return float64(st.Leases) })
	value("crowded", "Connections closed because their address had too many under way, since the start.", func(st Status) float64 { return float64(st.Crowded) })
	value("sent_bytes", "Bytes towards laptops since the start.", func(st Status) float64 { return float64(st.Counters.SentBytes) })
	value("received_bytes", "Bytes from laptops since the start.", func(st Status) float64 { return float64(st.Counters.ReceivedBytes) })
	value("revocations_heard", "1 while the feed of revocations is to be relied on, or none is configured.", func(Status) float64 {
		if s.Revocations != nil && s.Revocations.Heard() != nil {
			return 0
		}
		return 1
	})
	return m
}

// refusedWith counts a refusal.
func (m *metrics) refusedWith(status int) { m.refused.WithLabelValues(strconv.Itoa(status)).Inc() }

// MetricsHandler answers GET /metrics in Prometheus' text format, and nothing
// else.
func (s *Server) MetricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{}))
	return mux
}

// serveMetrics serves the metrics at the configuration's address until ctx
// ends. An address without a host is on loopback.
func (s *Server) serveMetrics(ctx context.Context) error {
	if s.config.Metrics == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(s.config.Metrics)
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
	srv := &http.Server{Handler: s.MetricsHandler(), ReadTimeout: scrapeTime, WriteTimeout: scrapeTime, IdleTimeout: scrapeTime, MaxHeaderBytes: maxHeader}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(netutil.LimitListener(l, maxScrapes)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("metrics: %w", err)
	}
	return nil
}
