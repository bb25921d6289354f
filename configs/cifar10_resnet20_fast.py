from clusterq_jax import config as config_lib


def get_config():
  config = config_lib.defaults()
  config.checkpoint_every = 250
  config.teacher.weights = 'weights/resnet20-12fca82f.th'
  config.teacher.image_size = (32, 32)
  config.teacher.mean = (0.485, 0.456, 0.406)
  config.teacher.std = (0.229, 0.224, 0.225)
  config.quant.ranges = 'learned'
  config.generator.channels = (128, 64, 32)
  config.student.optimizer = 'adam'
  config.student.lr = 2e-4
  config.student.quant_lr = 2e-3
  config.loss.student_cross_entropy = 0.0
  config.schedule.batch_size = 128
  config.schedule.warmup_steps = 200
  config.schedule.generator_steps = 200
  config.schedule.joint_steps = 0
  config.schedule.student_steps = 200
  config.schedule.pool_batches = 120
  config.schedule.lr_decay = 'cosine'
  config.report.log_every = 10
  return config
